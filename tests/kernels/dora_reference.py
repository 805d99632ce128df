"""DoRA's linear layer by hand: the formulas of arXiv 2402.09353 in plain torch, in any dtype."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels import dora_backward, dora_forward, row_norm
from tests.kernels.memory import untouched
from tests.kernels.reference import Problem, make_problem

RESULTS = ("dx", "dA", "dB", "dm", "dbias")


@dataclass(kw_only=True)
class DoraProblem(Problem):
    """Operands of one layer; the magnitude may have a dtype of its own."""

    magnitude: Tensor  # [N]
    norm: Tensor | None = None  # [N] fp32 in place of the rows' own norm, where results are to be exact
    drop_base: bool = True

    def to(self, dtype: torch.dtype) -> DoraProblem:
        """Every operand cast to `dtype`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor) and name != "keep":
                values[name] = value.to(dtype)
        return DoraProblem(**values)


def make_dora(
    m: int,
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    adapter: torch.dtype | None = None,
    bias: bool = True,
) -> DoraProblem:
    """`make_problem`, with magnitudes around the rows' norms, some negative."""
    p = make_problem(m, k, n, r, dtype, device, adapter=adapter, bias=bias)
    generator = torch.Generator().manual_seed(n)
    magnitude = 1.0 + 0.3 * torch.randn(n, generator=generator)
    magnitude[::7] *= -1
    return DoraProblem(**vars(p), magnitude=magnitude.to(device, adapter or dtype))


def evaluate_norm(p: DoraProblem) -> Tensor:
    """`||W + s B A||` of each row, or the norm that the problem gives."""
    if p.norm is not None:
        return p.norm
    return torch.linalg.vector_norm(p.weight + p.scaling * (p.lora_B @ p.lora_A), dim=1)


def evaluate_dora(p: DoraProblem) -> dict[str, Tensor]:
    """Forward and backward in the operands' own dtype, every intermediate rounded to it."""
    n = evaluate_norm(p)
    c = p.magnitude / n
    dropped = p.x if p.keep is None else torch.where(p.keep, p.x / (1 - p.dropout_p), 0)
    base = dropped if p.drop_base else p.x
    S = dropped @ p.lora_A.T
    z = base @ p.weight.T + (S @ p.lora_B.T) * p.scaling
    y = z * c
    if p.drop_base and p.keep is not None:
        y = p.x @ p.weight.T + (c - 1) * (dropped @ p.weight.T) + c * ((S @ p.lora_B.T) * p.scaling)
    if p.bias is not None:
        y = y + p.bias
    g = p.dy * c
    dS = (g @ p.lora_B) * p.scaling
    dx_low = dS @ p.lora_A
    first, second = (p.dy, p.dy * (c - 1)) if p.drop_base and p.keep is not None else (g, None)
    if second is not None:
        dx_low = dx_low + second @ p.weight
    if p.keep is not None:
        dx_low = torch.where(p.keep, dx_low / (1 - p.dropout_p), 0)
    return {
        "norm": n,
        "S": S,
        "z": z,
        "y": y,
        "dx": first @ p.weight + dx_low,
        "dA": dS.T @ dropped,
        "dB": (g.T @ S) * p.scaling,
        "dm": (p.dy * z).sum(0) / n,
        "dbias": p.dy.sum(0),
    }


def run_dora(p: DoraProblem, *, keep_z: bool | None = None, seed: Tensor | None = None) -> dict[str, Tensor]:
    """All results of the kernels for `p`, left as it was; z is kept where dm needs it, or as said."""
    with untouched(p, seed):
        return _run_dora(p, keep_z, seed)


def _run_dora(p: DoraProblem, keep_z: bool | None, seed: Tensor | None) -> dict[str, Tensor]:
    if keep_z is None:
        keep_z = p.bias is not None or (p.drop_base and p.dropout_p > 0.0) or p.x.dtype == torch.float16
    norm = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling) if p.norm is None else p.norm
    adapter = (p.weight, p.lora_A, p.lora_B, p.magnitude, norm)
    y, S, z = dora_forward(
        p.x,
        p.weight,
        p.bias,
        p.lora_A,
        p.lora_B,
        p.magnitude,
        norm,
        p.scaling,
        p.dropout_p,
        seed,
        drop_base=p.drop_base,
        keep_z=keep_z,
    )
    gradients = dora_backward(
        p.dy,
        p.x,
        z if keep_z else y,
        *adapter,
        S,
        p.scaling,
        p.dropout_p,
        seed,
        drop_base=p.drop_base,
        kept_is_z=keep_z,
        need_x=True,
        need_A=True,
        need_B=True,
        need_m=True,
        need_bias=True,
        bias_dtype=p.bias.dtype if p.bias is not None else None,
    )
    found = {"norm": norm, "S": S, "y": y, **dict(zip(RESULTS, gradients, strict=True))}
    if z is not None:
        found["z"] = z
    assert all(isinstance(tensor, Tensor) for tensor in found.values())
    return found  # type: ignore[return-value]
