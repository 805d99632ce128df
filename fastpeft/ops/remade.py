"""Operands that are products of smaller ones: kept for backward as their factors, and made anew there.

For VeRA's ``diag(b) B diag(d)`` [out_features, r]: b and d are Parameters and B is shared by all layers, so
that nothing is kept. An op that may be given such an operand saves with :func:`save` and reads with
:func:`saved`; anything else is saved as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_FACTORS = "_fastpeft_factors"
_marked_any = False  # looking for factors costs 3 us a call, and hardly any model has operands that have some


def scaled(b: Tensor, B: Tensor, d: Tensor) -> Tensor:
    """Return ``diag(b) B diag(d)``."""
    product = b[:, None] * B
    return product * d if product.requires_grad else product.mul_(d)  # where a backward is differentiated


def mark(product: Tensor, b: Tensor, B: Tensor, d: Tensor) -> None:
    """Say of which factors :func:`scaled` made a tensor; it must not be written to."""
    global _marked_any
    _marked_any = True
    setattr(product, _FACTORS, (b, B, d))


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """``ctx.save_for_backward`` of tensors, with the factors for those that have some."""
    if not _marked_any:
        ctx.save_for_backward(*tensors)
        ctx.remade = ()
        return
    flat: list[Tensor | None] = []
    places = []
    for place, tensor in enumerate(tensors):
        factors = getattr(tensor, _FACTORS, None)
        if factors is not None:
            places.append(place)
        flat += [tensor] if factors is None else factors
    ctx.save_for_backward(*flat)
    ctx.remade = places


def saved(ctx: Any) -> list[Any]:
    """Return what :func:`save` was given."""
    tensors = list(ctx.saved_tensors)
    for place in ctx.remade:
        tensors[place : place + 3] = [scaled(*tensors[place : place + 3])]
    return tensors
