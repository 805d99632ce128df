"""DoRA forward and backward against fp64, by the rule of tests/tolerance.py."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels import configs, dora_backward, dora_forward, row_norm
from tests.kernels.dora_reference import (
    RESULTS,
    DoraProblem,
    evaluate_dora,
    evaluate_norm,
    make_dora,
    run_dora,
)
from tests.kernels.test_dropout import recover_mask, seed_of
from tests.kernels.test_numerics import DTYPES, spread
from tests.tolerance import assert_within_rule

# (M, K, N, r): several tiles each way; r below the tile, on it, over several, above both widths.
SHAPES = [
    pytest.param(33, 50, 47, 1, id="r1"),
    pytest.param(64, 64, 96, 16, id="even-r16"),
    pytest.param(70, 63, 45, 40, id="r40-two-rank-tiles"),
    pytest.param(20, 40, 35, 130, id="r130-above-in-and-out"),
    # Wide: over 17 columns or 8 ranks the ratio of two rounding errors is chance, each BLAS has another.
    pytest.param(1, 33, 170, 72, id="one-token"),
]


def with_dropout(p: DoraProblem, dropout_p: float = 0.3) -> torch.Tensor:
    """Give `p` a dropout and the kernels' own mask; returns the seed."""
    seed = seed_of(-(2**40) - 3, p.x.device)
    p.dropout_p, p.keep = dropout_p, recover_mask(*p.x.shape, dropout_p, seed)
    return seed


def check(p: DoraProblem, *, keep_z: bool | None = None, seed: torch.Tensor | None = None) -> None:
    found = run_dora(p, keep_z=keep_z, seed=seed)
    reference, plain = evaluate_dora(p.to(torch.float64)), evaluate_dora(p.to(p.x.dtype))
    for name, tensor in found.items():
        assert_within_rule(tensor, reference[name], plain[name], name)
    assert found["y"].dtype == found["S"].dtype == found["dx"].dtype == p.x.dtype
    expected = (p.lora_A.dtype, p.lora_B.dtype, p.magnitude.dtype, torch.float32)
    assert tuple(found[name].dtype for name in ("dA", "dB", "dm", "norm")) == expected


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_ragged(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    """With a bias: z is kept."""
    check(make_dora(m, k, n, r, dtype, device))


def test_largest_rank(device: torch.device) -> None:
    check(make_dora(5, 20, 18, 512, torch.bfloat16, device, adapter=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("r", [5, 40])
def test_magnitude_from_y(r: int, dtype: torch.dtype, device: torch.device) -> None:
    """Without a bias, dm comes from y, and nothing more is kept."""
    check(make_dora(37, 50, 45, r, dtype, device, bias=False))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("drop_base", [True, False], ids=["drop-base", "adapter-only"])
@pytest.mark.parametrize(("k", "r"), [(50, 5), (63, 40)], ids=["k50-r5", "k63-r40"])
def test_dropout(k: int, r: int, drop_base: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Both meanings, forward and backward on one mask, which the test recovers from LoRA's forward."""
    p = make_dora(37, k, 45, r, dtype, device, adapter=torch.float32)
    p.drop_base = drop_base
    check(p, seed=with_dropout(p))


def test_dropout_without_bias(device: torch.device) -> None:
    """Adapter-only dropout leaves y = c z, so dm comes from y; PEFT's does not, and z is kept."""
    for drop_base in (True, False):
        p = make_dora(37, 50, 45, 5, torch.bfloat16, device, bias=False)
        p.drop_base = drop_base
        check(p, seed=with_dropout(p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("r", [5, 40])
def test_fp32_adapters(r: int, dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(70, 50, 45, r, dtype, device, adapter=torch.float32)
    assert p.bias is not None
    p.bias = p.bias.float()
    check(p)


STRIDED = {
    "x-transposed": {"x": lambda x: x.t().contiguous().t()},
    "dy-expanded": {"dy": lambda dy: dy[:1, :1].expand(dy.shape)},
    "weight-transposed": {"weight": lambda w: w.t().contiguous().t()},
    "all-spread": dict.fromkeys(("x", "dy", "weight", "lora_A", "lora_B"), spread)
    | {"magnitude": lambda m: spread(m[None])[0]},
}


@pytest.mark.parametrize("change", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize(("r", "drop"), [(40, False), (5, True)], ids=["r40", "r5-drop-base"])
def test_strides(change: dict, r: int, drop: bool, device: torch.device) -> None:  # type: ignore[type-arg]
    p = make_dora(37, 50, 45, r, torch.bfloat16, device)
    for name, make in change.items():
        setattr(p, name, make(getattr(p, name)))
    check(p, seed=with_dropout(p) if drop else None)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-6, 300.0, 2])
@pytest.mark.parametrize("drop", [False, True], ids=["plain", "drop-base"])
def test_scaling_of_any_size(scaling: float, drop: bool, device: torch.device) -> None:
    p = make_dora(33, 40, 45, 5, torch.float32, device)
    p.scaling = scaling
    check(p, seed=with_dropout(p) if drop else None)


@pytest.mark.parametrize("size", [1e-12, 1e12], ids=["tiny", "huge"])
@pytest.mark.parametrize("bias", [False, True], ids=["from-y", "from-z"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_magnitude_of_any_size(size: float, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(33, 40, 45, 5, dtype, device, bias=bias)
    p.magnitude *= size
    check(p)


@pytest.mark.parametrize("r", [5, 40])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_zero_tokens(r: int, dropout_p: float, device: torch.device) -> None:
    p = make_dora(0, 50, 45, r, torch.bfloat16, device, adapter=torch.float32)
    p.dropout_p = dropout_p
    found = run_dora(p, seed=seed_of(1, device))
    assert found["y"].shape == found["z"].shape == (0, 45)
    assert (found["S"].shape, found["dx"].shape) == ((0, r), (0, 50))
    for name, like in {"dA": p.lora_A, "dB": p.lora_B, "dm": p.magnitude, "dbias": p.dy[0:1].sum(0)}.items():
        assert torch.equal(found[name], torch.zeros_like(like)), name


@pytest.mark.parametrize(("asked", "r"), [*((asked, 5) for asked in range(32)), (3, 40), (9, 40), (20, 40)])
def test_only_asked_for_gradients(asked: int, r: int, device: torch.device) -> None:
    """Each subset gives what the full set gives, and None for the rest; x and z only where they are used."""
    p = make_dora(20, 18, 35, r, torch.float32, device)
    flags = {
        name: bool(asked >> bit & 1)
        for bit, name in enumerate(("need_x", "need_A", "need_B", "need_m", "need_bias"))
    }
    norm = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
    layer = (p.weight, p.lora_A, p.lora_B, p.magnitude, norm)
    _, S, z = dora_forward(
        p.x, p.weight, p.bias, *layer[1:], p.scaling, drop_base=True, keep_z=flags["need_m"]
    )
    x = p.x if flags["need_A"] else None
    gradients = dora_backward(p.dy, x, z, *layer, S, p.scaling, drop_base=True, kept_is_z=True, **flags)
    reference, plain = evaluate_dora(p.to(torch.float64)), evaluate_dora(p)
    for name, wanted, gradient in zip(RESULTS, flags.values(), gradients, strict=True):
        assert (gradient is not None) == wanted, name
        if gradient is not None:
            assert_within_rule(gradient, reference[name], plain[name], name)


@pytest.mark.parametrize(("r", "drop"), [(5, False), (40, False), (5, True)])
def test_two_runs_are_bitwise_equal(r: int, drop: bool, device: torch.device) -> None:
    p = make_dora(90, 70, 45, r, torch.bfloat16, device, adapter=torch.float32)
    seed = with_dropout(p) if drop else None
    first, second = run_dora(p, seed=seed), run_dora(p, seed=seed)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "unaligned"])
def test_shipped_tiles(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of real devices, not the interpreter's, give the same numbers."""
    monkeypatch.setitem(configs.TABLES, "interpreter", configs.TABLES[arch])
    p = make_dora(70, 50, 300, 20, torch.bfloat16, device, adapter=torch.float32)
    check(p)
    check(p, seed=with_dropout(p))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("k", "n", "r"), [(1, 1, 1), (50, 17, 5), (33, 40, 32), (70, 33, 100)])
def test_row_norm(k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(1, k, n, r, dtype, device, adapter=torch.float32)
    for weight in (p.weight, p.weight.t().contiguous().t(), spread(p.weight)):
        p.weight = weight
        found = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
        assert_within_rule(found, evaluate_norm(p.to(torch.float64)), evaluate_norm(p.to(dtype)), "norm")


def test_row_norm_of_the_largest_rank(device: torch.device) -> None:
    p = make_dora(1, 20, 18, 512, torch.bfloat16, device, adapter=torch.float32)
    found = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
    assert_within_rule(found, evaluate_norm(p.to(torch.float64)), evaluate_norm(p.to(torch.bfloat16)), "norm")


def test_row_norm_does_not_go_below_zero(device: torch.device) -> None:
    """s B A = -W: the factored sum cancels to rounding error, on either side of zero."""
    p = make_dora(1, 30, 40, 3, torch.float32, device)
    found = row_norm(-0.5 * (p.lora_B @ p.lora_A), p.lora_A, p.lora_B, 0.5)
    assert torch.isfinite(found).all()
    assert (found < 1e-2).all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"magnitude": torch.zeros(5)}, ValueError),
        ({"norm": torch.zeros(7)}, ValueError),
        ({"norm": torch.zeros(6, dtype=torch.bfloat16)}, TypeError),
        ({"norm": torch.zeros(12)[::2]}, TypeError),
        ({"magnitude": torch.zeros(6, dtype=torch.int64)}, TypeError),
        ({"x": torch.zeros(3, 4)}, ValueError),
        ({"dropout_p": 0.5}, ValueError),
    ],
    ids=["magnitude", "norm", "norm-bf16", "norm-strided", "magnitude-int", "x-width", "no-seed"],
)
def test_wrong_arguments_are_refused(change: dict[str, object], error: type[Exception]) -> None:
    arguments = {
        "x": torch.zeros(3, 5),
        "weight": torch.zeros(6, 5),
        "bias": None,
        "lora_A": torch.zeros(2, 5),
        "lora_B": torch.zeros(6, 2),
        "magnitude": torch.zeros(6),
        "norm": torch.ones(6),
        "scaling": 1.0,
    }
    with pytest.raises(error):
        dora_forward(**(arguments | change), drop_base=True, keep_z=False)  # type: ignore[arg-type]
