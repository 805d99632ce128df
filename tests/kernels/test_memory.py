"""What the kernels touch: every output element, and nothing outside their operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from fastpeft_kernels import lora_backward, lora_forward
from tests.kernels import memory
from tests.kernels.reference import Problem, make_problem

CASES = [
    pytest.param(37, 50, 45, 5, 0.0, id="r5"),
    pytest.param(37, 50, 45, 5, 0.3, id="r5-dropout"),
    pytest.param(35, 33, 70, 40, 0.3, id="r40-dropout"),
    pytest.param(1, 1, 1, 1, 0.0, id="ones"),
]


def forward_and_backward(p: Problem) -> Iterator[tuple[str, torch.Tensor | None]]:
    seed = torch.tensor([3], dtype=torch.int64, device=p.x.device)
    y, S = lora_forward(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, p.dropout_p, seed)
    yield from (("y", y), ("S", S))
    wanted = {"need_x": True, "need_A": True, "need_B": True, "need_bias": True}
    gradients = lora_backward(
        p.dy, p.x, p.weight, p.lora_A, p.lora_B, S, p.scaling, p.dropout_p, seed, **wanted
    )
    yield from zip(("dx", "dA", "dB", "dbias"), gradients, strict=True)


def in_nan(p: Problem) -> Problem:
    """The same problem, each operand a view into storage that is NaN all round."""
    assert p.bias is not None
    wrap: Callable[[torch.Tensor], torch.Tensor] = memory.surrounded_by_nan
    return replace(
        p,
        x=wrap(p.x),
        weight=wrap(p.weight),
        bias=wrap(p.bias[None])[0],
        lora_A=wrap(p.lora_A),
        lora_B=wrap(p.lora_B),
        dy=wrap(p.dy),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("m", "k", "n", "r", "dropout_p"), CASES)
def test_nothing_stray(
    m: int, k: int, n: int, r: int, dropout_p: float, dtype: torch.dtype, device: torch.device
) -> None:
    """NaN round the inputs, NaN in the outputs, guard zones beside them, addresses checked: the same bits."""
    p = make_problem(m, k, n, r, dtype, device, adapter=torch.float32)
    p.dropout_p = dropout_p
    expected = dict(forward_and_backward(p))
    q = in_nan(p)
    with memory.every_guard(q):
        found = dict(forward_and_backward(q))
    for name, tensor in found.items():
        assert tensor is not None
        assert torch.isfinite(tensor).all(), f"{name}: NaN was read, or elements were not written"
        assert torch.equal(tensor, expected[name]), name
