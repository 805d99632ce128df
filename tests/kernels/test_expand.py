"""The path through the vendor's GEMM: expand-and-scale in place, for forward and for dx."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastpeft_kernels import (
    configs,
    dora_forward_expand,
    expand_add_,
    expand_scale_,
    launch,
    lora_forward_expand,
    row_norm,
)
from tests.kernels import forward, memory
from tests.kernels.dora_reference import DoraProblem, make_dora
from tests.kernels.reference import evaluate
from tests.tolerance import assert_within_rule

# (M, K, N, r): several tiles each way; r below its tile of 16, on it, over several.
SHAPES = [
    pytest.param(35, 50, 47, 1, id="r1"),
    pytest.param(70, 33, 45, 5, id="r5"),
    pytest.param(64, 64, 64, 16, id="even-r16"),
    pytest.param(17, 20, 19, 40, id="r40-above-in-and-out"),
    pytest.param(1, 33, 17, 130, id="one-token-r130"),
]


def lora(p: DoraProblem, seed: Tensor | None = None) -> dict[str, Tensor | None]:
    y, S = lora_forward_expand(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, p.dropout_p, seed)
    return {"y": y, "S": S}


def dora(
    p: DoraProblem, seed: Tensor | None = None, *, keep_z: bool = True, drop_base: bool = False
) -> dict[str, Tensor | None]:
    y, S, z = dora_forward_expand(
        p.x,
        p.weight,
        p.bias,
        p.lora_A,
        p.lora_B,
        p.magnitude,
        row_norm(p.weight, p.lora_A, p.lora_B, p.scaling),
        p.scaling,
        p.dropout_p,
        seed,
        drop_base=drop_base,
        keep_z=keep_z,
    )
    assert (z is not None) == keep_z
    return {"y": y, "S": S, "z": z}


@pytest.mark.parametrize("dtype", forward.DTYPES.values(), ids=forward.DTYPES.keys())
@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_ragged(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(m, k, n, r, dtype, device)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p, drop_base=True), dora=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_fp32_adapters_without_bias(dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(40, 50, 45, 20, dtype, device, adapter=torch.float32, bias=False)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p, keep_z=False), dora=True)


def test_strides(device: torch.device) -> None:
    p = make_dora(37, 50, 45, 20, torch.bfloat16, device)
    q = forward.strided(p)
    forward.check(p, lora(q), dora=False)
    forward.check(p, dora(q), dora=True)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-6, 3e4, 2])
def test_scaling_of_any_size(scaling: float, device: torch.device) -> None:
    p = make_dora(33, 40, 45, 5, torch.float32, device)
    p.scaling = scaling
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)


def test_operands_that_train_stay_out_of_autograd(device: torch.device) -> None:
    p = make_dora(5, 6, 7, 2, torch.float32, device)
    p.x.requires_grad_()
    p.weight.requires_grad_()
    assert not lora(p)["y"].requires_grad


@pytest.mark.parametrize("r", [5, 40])
def test_dropout_in_front_of_a(r: int, device: torch.device) -> None:
    seed = torch.tensor([-(2**40) - 3], device=device)
    p = forward.drop(make_dora(37, 50, 45, r, torch.bfloat16, device), 0.3, seed)
    forward.check(p, lora(p, seed), dora=False)
    forward.check(p, dora(p, seed), dora=True)


def test_dropped_base_is_refused(device: torch.device) -> None:
    p = make_dora(3, 5, 6, 2, torch.float32, device)
    p.dropout_p = 0.3
    with pytest.raises(ValueError, match="drop_base"):
        dora(p, torch.tensor([3], device=device), drop_base=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", forward.DTYPES.values(), ids=forward.DTYPES.keys())
@pytest.mark.parametrize("r", [5, 40])
def test_dx(r: int, dtype: torch.dtype, dropout_p: float, device: torch.device) -> None:
    """`dx = dY W + mask * (dS A) / (1 - p)` with forward's mask."""
    seed = torch.tensor([11], device=device)
    p = make_dora(37, 50, 45, r, dtype, device, adapter=torch.float32)
    if dropout_p:
        p = forward.drop(p, dropout_p, seed)
    reference, plain = evaluate(p.to(torch.float64)), evaluate(p.to(dtype))
    dS = ((p.dy @ p.lora_B.to(dtype)) * p.scaling).contiguous()
    dx = expand_add_(p.dy @ p.weight, dS, p.lora_A, 1.0 / (1.0 - dropout_p), dropout_p, seed)
    assert_within_rule(dx, reference["dx"], plain["dx"], "dx")


def test_zero_tokens(device: torch.device) -> None:
    p = make_dora(0, 50, 45, 5, torch.bfloat16, device)
    for found in (lora(p), dora(p)):
        assert [t.shape for t in found.values() if t is not None] == [(0, 45), (0, 5), (0, 45)][: len(found)]


def test_guarded_rows(device: torch.device) -> None:
    """A row of norm 0 gives 0 without a bias; m = 0 keeps z readable from y; no other row's bits move."""
    p = make_dora(20, 30, 40, 5, torch.float32, device, bias=False)
    q = replace(p, weight=p.weight.clone(), lora_B=p.lora_B.clone(), magnitude=p.magnitude.clone())
    q.weight[3], q.lora_B[3], q.magnitude[7] = 0.0, 0.0, 0.0
    found, expected = dora(q), dora(p)
    assert not found["y"][:, 3].any()
    torch.testing.assert_close(found["y"][:, 7] * 2.0**100, found["z"][:, 7], rtol=1e-6, atol=0.0)
    others = [i for i in range(40) if i not in (3, 7)]
    assert torch.equal(found["y"][:, others], expected["y"][:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("m", "n", "r"), [(37, 45, 5), (33, 18, 40), (1, 1, 1)], ids=["r5", "r40", "ones"])
def test_nothing_stray(m: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    """NaN round the inputs, guard zones round y and z, addresses checked: the same bits, twice."""
    p = make_dora(m, 20, n, r, dtype, device, adapter=torch.float32)
    base, S = p.x @ p.weight.T, p.x @ p.lora_A.T.to(dtype)
    norm, seed = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling), torch.tensor([3], device=device)

    def run(p: DoraProblem, S: Tensor, dropped: Tensor) -> list[Tensor]:
        y, z, plain, dx = (launch.empty((m, n), dtype, base) for _ in range(4))
        for buffer in (y, plain, dx):
            buffer.copy_(base)
        expand_scale_(y, S, p.lora_B, p.scaling, p.bias, p.magnitude, norm, z)
        expand_scale_(plain, S, p.lora_B, p.scaling)
        expand_add_(dx, S, dropped, 1.25, 0.2, seed)
        return [y, z, plain, dx]

    right = p.lora_B.t().contiguous()
    expected = run(p, S, right)
    inputs = (forward.in_nan(p), memory.surrounded_by_nan(S), memory.surrounded_by_nan(right))
    with memory.every_guard(inputs, norm, base, seed):
        found = run(*inputs)
    for before, after in zip(expected, found, strict=True):
        assert torch.isfinite(after).all(), "NaN was read, or elements were not written"
        assert torch.equal(after, before)


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", ["sm_90", "gfx1100", "unaligned"])
def test_shipped_tiles(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.TABLES, "interpreter", configs.TABLES[arch])
    p = make_dora(70, 50, 140, 70, torch.bfloat16, device, adapter=torch.float32)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)


Y, S_, B = torch.zeros(4, 6), torch.zeros(4, 2), torch.zeros(6, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        (Y.t().contiguous().t(), S_, B, 1.0),
        (Y, S_[:3], B, 1.0),
        (Y, S_, B[:5], 1.0),
        (Y, S_.double(), B, 1.0),
        (Y, S_, B, 1.0, None, torch.ones(6), None),
        (Y, S_, B, 1.0, None, torch.ones(6), torch.ones(5)),
        (Y, S_, B, 1.0, None, None, None, Y[:3]),
    ],
    ids=["y-strides", "S-rows", "B-rows", "S-dtype", "no-norm", "norm-shape", "z-shape"],
)
def test_wrong_arguments_are_refused(arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected|together"):
        expand_scale_(*arguments)  # type: ignore[arg-type]


def test_dropout_without_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        expand_add_(Y.clone(), S_, B.t(), 1.0, 0.5)
