"""Rows that need care: a magnitude of 0, a norm of 0; the other rows do not notice, to the last bit."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.dora_reference import DoraProblem, evaluate_dora, make_dora, run_dora
from tests.kernels.test_dora import with_dropout
from tests.tolerance import assert_within_rule

ROW = 4
TINY = 2.0**-100


def others(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """`tensor` without index ROW of `dim`."""
    return tensor.index_select(
        dim, torch.tensor([i for i in range(tensor.shape[dim]) if i != ROW], device=tensor.device)
    )


def check_other_rows(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """The bits of every row but ROW are the same in all results that have rows of W."""
    for name, dim in {"norm": 0, "y": 1, "dB": 0, "dm": 0, "dbias": 0}.items():
        assert torch.equal(others(before[name], dim), others(after[name], dim)), name


def with_magnitude(p: DoraProblem, m: float, *, drop_base: bool) -> dict[str, torch.Tensor]:
    """Results with ROW's magnitude set to m: by the rule, dm of ROW too, and every other row to the bit."""
    seed = with_dropout(p) if drop_base else None
    before = run_dora(p, seed=seed)
    p.magnitude[ROW] = m
    after = run_dora(p, seed=seed)
    check_other_rows(before, after)
    reference, plain = evaluate_dora(p.to(torch.float64)), evaluate_dora(p.to(p.x.dtype))
    for name in ("y", "dx", "dA", "dB", "dm"):
        assert_within_rule(after[name], reference[name], plain[name], name)
    error = (after["dm"][ROW].double() - reference["dm"][ROW]).abs()
    assert error <= 4 * (plain["dm"].double() - reference["dm"]).abs().max()
    return after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("zero", "kind", "r"),
    [
        *((0.0, kind, 5) for kind in ("from-y", "from-z", "drop-base")),
        *((size, "from-y", 40) for size in (0.0, -1e-36)),
        *((size, "from-y", 5) for size in (-0.0, 1e-36)),
    ],
)
def test_zero_magnitude(zero: float, kind: str, r: int, dtype: torch.dtype, device: torch.device) -> None:
    """dm of that row is as good as any other's, y is the bias, and no other row changes a bit."""
    p = make_dora(37, 50, 45, r, dtype, device, bias=kind != "from-y", adapter=torch.float32)
    after = with_magnitude(p, zero, drop_base=kind == "drop-base")
    if kind == "from-y":
        assert after["y"][:, ROW].any()
        assert after["y"][:, ROW].abs().max() < 1e-28


@pytest.mark.parametrize("kind", ["no-bias", "bias", "drop-base"])
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-36, -1e-36])
def test_zero_magnitude_fp16(zero: float, kind: str, device: torch.device) -> None:
    """z is kept, since y cannot hold 2^-100 z: it is the bias or 0, and dm of that row is still right."""
    p = make_dora(37, 50, 45, 5, torch.float16, device, bias=kind != "no-bias", adapter=torch.float32)
    after = with_magnitude(p, zero, drop_base=kind == "drop-base")
    if kind != "drop-base":
        expected = torch.zeros_like(after["y"][:, ROW]) if p.bias is None else p.bias[ROW].expand(37)
        assert torch.equal(after["y"][:, ROW], expected)


@pytest.mark.parametrize("kind", ["from-y", "from-z", "drop-base"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
def test_zero_row(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """A row of W and of B that is zero has n = 0: c and dm are 0, nothing is NaN, no other row changes."""
    p = make_dora(37, 50, 45, 5, dtype, device, bias=kind != "from-y")
    seed = with_dropout(p) if kind == "drop-base" else None
    before = run_dora(p, seed=seed)
    p.weight[ROW] = 0.0
    p.lora_B[ROW] = 0.0
    after = run_dora(p, seed=seed)
    check_other_rows(before, after)
    assert after["norm"][ROW] == 0.0
    assert after["dm"][ROW] == 0.0
    assert not after["dB"][ROW].any()
    expected = torch.zeros_like(after["y"][:, ROW]) if p.bias is None else p.bias[ROW].expand(37)
    assert torch.equal(after["y"][:, ROW], expected)
    for name, tensor in after.items():
        assert torch.isfinite(tensor).all(), name
    # Without that row, the layer is the reference's: its gradients are what the row adds nothing to.
    rest = without_row(p)
    reference, plain = evaluate_dora(rest.to(torch.float64)), evaluate_dora(rest.to(dtype))
    for name in ("dx", "dA"):
        if kind == "drop-base" and name == "dx":
            continue  # dY W of a zero row is zero too, but (c - 1) = -1 rounds differently: covered above
        assert_within_rule(after[name], reference[name], plain[name], name)


def without_row(p: DoraProblem) -> DoraProblem:
    """`p` without output feature ROW."""
    rest = p.to(p.x.dtype)
    rest.weight, rest.lora_B, rest.magnitude = (others(t, 0) for t in (p.weight, p.lora_B, p.magnitude))
    rest.bias = None if p.bias is None else others(p.bias, 0)
    rest.dy = others(p.dy, 1)
    return rest
