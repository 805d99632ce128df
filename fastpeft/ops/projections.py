"""What the block ops do beside the fused path: checks of the projections, references, single linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.errors import ShapeError
from fastpeft.ops._common import autocast_inputs, autocast_is_on, check_inputs
from fastpeft.ops.dora import dora_linear, dora_linear_reference
from fastpeft.ops.eager import is_transformed
from fastpeft.ops.kernel_paths import kernels
from fastpeft.ops.lora import lora_linear, lora_linear_reference
from fastpeft.ops.probability import Probability, dropped, is_dropping
from fastpeft.ops.row_norm import row_norm, row_norm_squared
from fastpeft_kernels.projection import Projection


def rank(p: Projection) -> int:
    """Return r, 0 without an adapter."""
    return 0 if p.lora_A is None else p.lora_A.shape[0]


def adapter(p: Projection) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B, of rank 0 without an adapter."""
    if p.lora_A is None or p.lora_B is None:
        return p.weight.new_empty(0, p.weight.shape[-1]), p.weight.new_empty(p.weight.shape[0], 0)
    return p.lora_A, p.lora_B


def autocast(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, list[Projection]]:
    """Cast to autocast's dtype where it is on, as :func:`autocast_inputs` does."""
    if not autocast_is_on(x):
        return x, list(projections)
    cast = []
    for p in projections:
        _, weight, bias = autocast_inputs(x, p.weight, p.bias)
        if weight.dtype != p.weight.dtype:
            p = with_norm(p)  # of the weight itself, not of autocast's copy
        cast.append(replace(p, weight=weight, bias=bias))
    return autocast_inputs(x, x, None)[0], cast


def with_norm(p: Projection, backend: str = "torch") -> Projection:
    """Return the projection with DoRA's row norm, a constant: the caller's, or computed if it keeps none."""
    if p.norm is not None and p.norm.requires_grad:
        return replace(p, norm=p.norm.detach())
    if p.magnitude is None or p.norm is not None or p.lora_A is None or p.lora_B is None:
        return p
    with torch.no_grad():
        if backend == "triton":
            norm = kernels().row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
        else:
            norm = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling, row_norm_squared(p.weight))
    return replace(p, norm=norm)


def check(what: str, x: Tensor, p: Projection) -> None:
    """Raise one ShapeError that names the projection and what does not fit."""
    if (p.lora_A is None) != (p.lora_B is None):
        raise ShapeError(f"{what}: expected both lora_A and lora_B or neither, got one of them")
    check_inputs(what, x, p.weight, p.bias, *adapter(p))
    if p.magnitude is not None and p.lora_A is None:
        raise ShapeError(f"{what}: expected lora_A and lora_B beside a magnitude, got none")
    for name, vector in (("magnitude", p.magnitude), ("norm", p.norm)):
        if vector is not None and vector.shape != p.weight.shape[:1]:
            raise ShapeError(f"{what}: expected {name} [{p.weight.shape[0]}], got {list(vector.shape)}")


def needs_plain_autograd(projections: Sequence[Projection]) -> bool:
    """Whether a base weight wants a gradient or a transform is at work: neither is the fused ops'."""
    return is_transformed() or (torch.is_grad_enabled() and any(p.weight.requires_grad for p in projections))


def needs_gradients(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether autograd will want a gradient of x or of anything that trains."""
    if not torch.is_grad_enabled():
        return False
    trained = (t for p in projections for t in (p.bias, p.lora_A, p.lora_B, p.magnitude))
    return x.requires_grad or any(t is not None and t.requires_grad for t in trained)


def spread(
    dropout_p: Probability | Sequence[Probability], projections: Sequence[Projection]
) -> list[Probability]:
    """Return one probability a projection."""
    if not isinstance(dropout_p, Sequence):
        return [dropout_p] * len(projections)
    if len(dropout_p) != len(projections):
        raise ShapeError(
            f"dropout_p: expected one probability, or {len(projections)} for as many projections, "
            f"got {len(dropout_p)}"
        )
    return list(dropout_p)


def dropout_moves_base(projections: Sequence[Projection], ps: Sequence[Probability], on_base: bool) -> bool:
    """Whether dropout reaches a base product, as PEFT's does in DoRA; the fused ops leave that to singles."""
    pairs = zip(projections, ps, strict=True)
    return on_base and any(p.magnitude is not None and is_dropping(q) for p, q in pairs)


def draw_mask(x: Tensor, dropout_p: Probability) -> Tensor | None:
    """Return a dropout mask for the plain autograd path, None without dropout."""
    return dropped(torch.ones_like(x), dropout_p) if is_dropping(dropout_p) else None


def linear(x: Tensor, p: Projection, dropout_p: Probability) -> Tensor:
    """Return one projection of x by the op for a single linear."""
    if p.lora_A is None or p.lora_B is None:
        return F.linear(x, p.weight, p.bias)
    base = (x, p.weight, p.bias, p.lora_A, p.lora_B)
    if p.magnitude is None:
        return lora_linear(*base, scaling=p.scaling, dropout_p=dropout_p)
    return dora_linear(*base, p.magnitude, scaling=p.scaling, dropout_p=dropout_p, norm=p.norm)


def with_seeds(ps: Sequence[float], seeds: Tensor | None) -> list[tuple[float, Tensor | None]]:
    """Return each projection's p and, where anything is dropped, its seed [1]."""
    return [(p, None if seeds is None else seeds[i : i + 1]) for i, p in enumerate(ps)]


def linear_reference(
    x: Tensor,
    p: Projection,
    mask: Tensor | None = None,
    dropout_on_base: bool = True,
    norm: Tensor | None = None,
) -> Tensor:
    """The formula of one projection, in whatever dtype x has; ``mask`` holds 0 or 1/(1-p)."""
    if p.lora_A is None or p.lora_B is None:
        return F.linear(x, p.weight, p.bias)
    A, B = p.lora_A.to(x.dtype), p.lora_B.to(x.dtype)
    if p.magnitude is None:
        return lora_linear_reference(x, p.weight, p.bias, A, B, p.scaling, mask)
    m = p.magnitude.to(x.dtype)
    return dora_linear_reference(x, p.weight, p.bias, A, B, m, p.scaling, mask, dropout_on_base, norm)
