"""LoRA's linear layer by hand: the formulas of arXiv 2106.09685 in plain torch, in any dtype."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastpeft_kernels import lora_backward, lora_forward
from tests.kernels.memory import untouched


@dataclass(kw_only=True)
class Problem:
    """Operands of one layer. The adapters and the bias may have dtypes of their own."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    dy: Tensor  # [M, N]
    scaling: float = 0.7
    keep: Tensor | None = None  # [M, K], True where an element is kept; None without dropout
    dropout_p: float = 0.0

    def to(self, dtype: torch.dtype) -> Problem:
        """Every operand cast to `dtype`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor) and name != "keep":
                values[name] = value.to(dtype)
        return Problem(**values)


def make_problem(
    m: int,
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    adapter: torch.dtype | None = None,
    bias: bool = True,
) -> Problem:
    """Gaussian operands, weights of variance 1/fan-in, seeded by the shape."""
    generator = torch.Generator().manual_seed(m * 1_000_003 + k * 10_007 + n * 101 + r)

    def draw(*shape: int, size: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(device, to)

    adapter = adapter or dtype
    return Problem(
        x=draw(m, k),
        weight=draw(n, k, size=k**-0.5),
        bias=draw(n) if bias else None,
        lora_A=draw(r, k, size=k**-0.5, to=adapter),
        lora_B=draw(n, r, size=r**-0.5, to=adapter),
        dy=draw(m, n),
    )


def evaluate(p: Problem) -> dict[str, Tensor]:
    """Forward and backward in the operands' own dtype, every intermediate rounded to it."""
    dropped = p.x if p.keep is None else torch.where(p.keep, p.x / (1 - p.dropout_p), 0)
    S = dropped @ p.lora_A.T
    y = p.x @ p.weight.T + (S @ p.lora_B.T) * p.scaling
    if p.bias is not None:
        y = y + p.bias
    dS = (p.dy @ p.lora_B) * p.scaling
    dx_low = dS @ p.lora_A
    if p.keep is not None:
        dx_low = torch.where(p.keep, dx_low / (1 - p.dropout_p), 0)
    return {
        "y": y,
        "S": S,
        "dx": p.dy @ p.weight + dx_low,
        "dA": dS.T @ dropped,
        "dB": (p.dy.T @ S) * p.scaling,
        "dbias": p.dy.sum(0),
    }


def run_lora(p: Problem, seed: Tensor | None = None) -> dict[str, Tensor]:
    """All results of the kernels for `p`, which they leave as it was."""
    with untouched(p, seed):
        return _run_lora(p, seed)


def _run_lora(p: Problem, seed: Tensor | None) -> dict[str, Tensor]:
    adapter = (p.weight, p.lora_A, p.lora_B)
    y, S = lora_forward(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, p.dropout_p, seed)
    gradients = lora_backward(
        p.dy,
        p.x,
        *adapter,
        S,
        p.scaling,
        p.dropout_p,
        seed,
        need_x=True,
        need_A=True,
        need_B=True,
        need_bias=True,
        bias_dtype=p.bias.dtype if p.bias is not None else None,
    )
    found = {"y": y, "S": S} | dict(zip(("dx", "dA", "dB", "dbias"), gradients, strict=True))
    assert all(isinstance(tensor, Tensor) for tensor in found.values())
    return found  # type: ignore[return-value]
