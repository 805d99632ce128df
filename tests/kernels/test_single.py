"""The single-kernel forward, LoRA and DoRA, against fp64; and the model that says when to take it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels import (
    MAX_RANK,
    configs,
    dora_decode,
    dora_forward_single,
    expand_scale_,
    lora_decode,
    lora_forward_single,
    prefers_single,
    row_norm,
    single,
)
from tests.kernels import forward, memory
from tests.kernels.dora_reference import DoraProblem, make_dora

# (M, K, N, r): several tiles each way, none a multiple of a tile; r below its tile, on it, over K and N.
SHAPES = [
    pytest.param(35, 50, 47, 1, id="r1"),
    pytest.param(70, 33, 45, 5, id="r5"),
    pytest.param(64, 64, 64, 16, id="even-r16"),
    pytest.param(17, 20, 19, 64, id="r64-above-in-and-out"),
    pytest.param(1, 33, 17, 33, id="one-token-r33"),
]


def lora(p: DoraProblem) -> dict[str, Tensor | None]:
    y, S = lora_forward_single(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    return {"y": y, "S": S}


def dora(p: DoraProblem, *, norm: Tensor | None = None, keep_z: bool = True) -> dict[str, Tensor | None]:
    y, S, z, norm = dora_forward_single(
        p.x,
        p.weight,
        p.bias,
        p.lora_A,
        p.lora_B,
        p.magnitude,
        norm,
        p.scaling,
        keep_z=keep_z,
    )
    assert (z is not None) == keep_z
    return {"y": y, "S": S, "z": z, "norm": norm}


def given_norm(p: DoraProblem) -> Tensor:
    return row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)


@pytest.mark.parametrize("dtype", forward.DTYPES.values(), ids=forward.DTYPES.keys())
@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_ragged(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(m, k, n, r, dtype, device)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)
    forward.check(p, dora(p, norm=given_norm(p), keep_z=False), dora=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_fp32_adapters_without_bias(dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(40, 50, 45, 5, dtype, device, adapter=torch.float32, bias=False)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p, norm=given_norm(p)), dora=True)
    forward.check(p, dora(p, keep_z=False), dora=True)


def test_strides(device: torch.device) -> None:
    p = make_dora(37, 50, 45, 5, torch.bfloat16, device)
    q = forward.strided(p)
    forward.check(p, lora(q), dora=False)
    forward.check(p, dora(q), dora=True)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-6, 3e4, 2])
def test_scaling_of_any_size(scaling: float, device: torch.device) -> None:
    p = make_dora(33, 40, 45, 5, torch.float32, device)
    p.scaling = scaling
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)


def test_zero_tokens(device: torch.device) -> None:
    p = make_dora(0, 50, 45, 5, torch.bfloat16, device)
    assert [t.shape for t in lora(p).values() if t is not None] == [(0, 45), (0, 5)]
    found = dora(p)
    assert [t.shape for t in found.values() if t is not None] == [(0, 45), (0, 5), (0, 45), (45,)]
    assert torch.equal(found["norm"], given_norm(p)), "the norm does not depend on tokens"


def test_guarded_rows(device: torch.device) -> None:
    """A row of norm 0 gives the bias; m = 0 keeps z readable from y; no other row's bits move."""
    p = make_dora(20, 30, 40, 5, torch.float32, device)
    q = replace(p, weight=p.weight.clone(), lora_B=p.lora_B.clone(), magnitude=p.magnitude.clone(), bias=None)
    expected = dora(replace(p, bias=None))
    q.weight[3], q.lora_B[3], q.magnitude[7] = 0.0, 0.0, 0.0
    found = dora(q)
    assert not found["y"][:, 3].any()
    assert not found["norm"][3]
    torch.testing.assert_close(found["y"][:, 7] * 2.0**100, found["z"][:, 7], rtol=1e-6, atol=0.0)
    others = [i for i in range(40) if i not in (3, 7)]
    assert torch.equal(found["y"][:, others], expected["y"][:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(37, 50, 45, 5), (17, 20, 19, 40), (1, 1, 1, 1)], ids=["r5", "r40", "ones"]
)
def test_nothing_stray(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    """NaN round the inputs, NaN in the outputs, guard zones, addresses checked: the same bits, twice."""
    p = make_dora(m, k, n, r, dtype, device, adapter=torch.float32)
    norm = given_norm(p)
    expected = [lora(p), dora(p), dora(p, norm=norm)]
    q = forward.in_nan(p)
    with memory.every_guard(q, norm):
        found = [lora(q), dora(q), dora(q, norm=norm)]
    for before, after in zip(expected, found, strict=True):
        for name, tensor in after.items():
            assert torch.isfinite(tensor).all(), f"{name}: NaN was read, or elements were not written"
            assert torch.equal(tensor, before[name]), name


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", ["sm_90", "gfx1100", "unaligned"])
def test_shipped_tiles(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.TABLES, "interpreter", configs.TABLES[arch])
    p = make_dora(70, 50, 140, 20, torch.bfloat16, device, adapter=torch.float32)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)


def test_norm_where_no_row_covers_the_rank(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables without a row for the norm at this rank: `row_norm` makes it."""
    made: list[Tensor] = []
    monkeypatch.setattr(single, "row_norm", lambda *a: made.append(row_norm(*a)) or made[-1])
    p = make_dora(20, 30, 40, 33, torch.float32, device)
    dora(p)
    assert not made
    for table in ("interpreter", "fp32"):
        monkeypatch.setitem(configs.TABLES, table, configs.TABLES["fp32"])
    found = dora(p)
    assert found["norm"] is made[0]
    forward.check(p, found, dora=True)


def test_large_rank_and_dropout_are_refused(device: torch.device) -> None:
    p = make_dora(3, 5, 6, MAX_RANK + 1, torch.float32, device)
    seed = torch.tensor([3], device=device)
    for run in (lora, dora):
        with pytest.raises(ValueError, match="r up to 64 and no dropout"):
            run(p)
    with pytest.raises(ValueError, match="no dropout"):
        lora_forward_single(p.x, p.weight, None, p.lora_A[:2], p.lora_B[:, :2], 1.0, 0.1, seed)


def test_wrong_norm_is_refused(device: torch.device) -> None:
    p = make_dora(3, 5, 6, 2, torch.float32, device)
    with pytest.raises(ValueError, match="magnitude and norm"):
        dora(p, norm=torch.ones(5, device=device))
    with pytest.raises(TypeError, match="float32 norm"):
        dora(p, norm=torch.ones(6, dtype=torch.float64, device=device))


def test_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch each, where the split forward needs two, or three for DoRA without a norm."""
    launched: list[str] = []

    class Counted:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    p = make_dora(16, 40, 70, 8, torch.bfloat16, device)
    norm = given_norm(p)
    linear = (p.x, p.weight, p.bias, p.lora_A, p.lora_B)
    y, S = p.x @ p.weight.t(), p.x @ p.lora_A.t()
    for module in [entry for name, entry in sys.modules.items() if name.startswith("fastpeft_kernels.")]:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    for call, kernel in (
        (lambda: lora(p), "single_kernel"),
        (lambda: dora(p), "single_kernel"),
        (lambda: dora(p, norm=norm), "single_kernel"),
        (lambda: lora_decode(*linear, 2.0), "decode_kernel"),
        (lambda: dora_decode(*linear, p.magnitude, norm, 2.0), "decode_kernel"),
        (lambda: expand_scale_(y, S, p.lora_B, 2.0), "expand_kernel"),
    ):
        launched.clear()
        call()
        assert launched == [kernel]


def test_when() -> None:
    """Few tokens: the launch saved decides; many: the tensor work added. Never with dropout or r above 64."""
    for m in (1, 16, 128, 256):
        assert prefers_single(m, 4096, 4096, 16)
        assert prefers_single(m, 4096, 4096, 16, needs_norm=True)
    for r in (16, 32, 64):
        chosen = [prefers_single(m, 4096, 4096, r) for m in (64, 512, 1024, 4096, 8192)]
        assert chosen == sorted(chosen, reverse=True), "one crossing"
        assert not chosen[-1]
    assert not prefers_single(16, 4096, 4096, 65)
    assert not prefers_single(16, 4096, 4096, 16, dropout=True)
    assert not prefers_single(0, 4096, 4096, 16)
