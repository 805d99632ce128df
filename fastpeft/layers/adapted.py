"""A linear with its adapters, whoever keeps them: drop-in modules and PEFT's own layers compute it here.

Adapter by adapter over the result so far, as PEFT does:

    LoRA   result + scaling * B A drop(x)
    DoRA   result + (c - 1) * (result - bias) + c * scaling * B A x          c = m / n
           result + (c - 1) * W drop(x) + c * scaling * B A drop(x)          with PEFT's dropout

The first adapter is fused with the base product where the base's weight is at hand; several LoRA adapters
without dropout are one whose rank is the sum of theirs. Over a base with a product of its own (quantised,
hooked, trained) the update is added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.layers.norm_cache import NormCache
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_add import lora_add
from fastpeft.ops.probability import Probability, dropped, is_dropping
from fastpeft.ops.row_norm import row_norm, row_norm_squared, row_scale


class Adapter(NamedTuple):
    """What one adapter adds: ``scaling * drop(x) lora_A^T lora_B^T + bias``; DoRA's has a magnitude.

    ``name`` is empty in compiled code (:mod:`fastpeft.layers.held`).

    ``dropout_on_base`` is the meaning of DoRA's dropout (:mod:`fastpeft.ops.dora`).
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    scaling: float
    dropout_p: Probability
    magnitude: Tensor | None
    dropout_on_base: bool = True


@dataclass(frozen=True, slots=True)
class Base:
    """The linear below the adapters.

    Attributes:
        product: its own forward, bias included.
        bias: [out_features] or None.
        weight: returns its weight [out_features, in_features] as numbers, dequantised if need be.
        is_ours: whether nobody else reads what ``product`` returns, so that it may be overwritten.
    """

    product: Callable[[Tensor], Tensor]
    bias: Tensor | None
    weight: Callable[[], Tensor]
    is_ours: bool


def with_response(adapters: list[Adapter], response: Tensor) -> list[Adapter] | None:
    """Return the adapters with their outputs times ``response``; None for DoRA, whose B is not all."""
    if any(adapter.magnitude is not None for adapter in adapters):
        return None
    return [
        a._replace(lora_B=a.lora_B * response, bias=None if a.bias is None else a.bias * response)
        for a in adapters
    ]


def suppressed(base: Tensor, y: Tensor, response: Tensor) -> Tensor:
    """Return the base's result and ``response`` of what adapters made of it."""
    return base + (y - base) * response.to(y.dtype)


def fused_linear(
    x: Tensor,
    parameter: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: list[Adapter],
    norm_cache: Callable[[str], NormCache],
    base: Callable[[], Base],
) -> Tensor:
    """[..., in_features] to [..., out_features], the first adapter fused with the base product.

    Args:
        x: the input.
        parameter: the base's weight as it is stored, the key of the norm's cache.
        weight: the same as [out_features, in_features].
        bias: the base's, or None.
        adapters: at least one.
        norm_cache: gives the cache of an adapter's row norm.
        base: makes the base for the adapters after the first.
    """
    one = with_one_adapter(adapters)
    first, rest = (adapters[0], adapters[1:]) if one is None else (one, [])
    if first.bias is not None:
        bias = first.bias.to(x.dtype) if bias is None else bias + first.bias.to(bias.dtype)
    if first.magnitude is None:
        y = lora_linear(
            x, weight, bias, first.lora_A, first.lora_B, scaling=first.scaling, dropout_p=first.dropout_p
        )
    else:
        norm = None
        if not torch.compiler.is_compiling():  # compiled code has its norm from the op, and no names
            cache = norm_cache(first.name)
            norm = cache.norm(parameter, weight, first.lora_A, first.lora_B, first.scaling)
        y = dora_linear(
            x,
            weight,
            bias,
            first.lora_A,
            first.lora_B,
            first.magnitude,
            scaling=first.scaling,
            dropout_p=first.dropout_p,
            dropout_on_base=first.dropout_on_base,
            norm=norm,
        )
    # DoRA keeps its output for backward.
    return adapters_over(y, x, rest, base(), is_ours=first.magnitude is None) if rest else y


def added_linear(x: Tensor, adapters: list[Adapter], base: Base) -> Tensor:
    """[..., in_features] to [..., out_features], every adapter added to the base's own product."""
    result = base.product(x)
    return adapters_over(result, x.to(result.dtype), adapters, base, is_ours=base.is_ours)


def adapters_over(result: Tensor, x: Tensor, adapters: list[Adapter], base: Base, *, is_ours: bool) -> Tensor:
    """Return the result with one adapter after the other; ``is_ours``: nobody else reads it."""
    for adapter in adapters:
        if adapter.magnitude is None:
            result = lora_add(
                result,
                x,
                adapter.lora_A,
                adapter.lora_B,
                scaling=adapter.scaling,
                dropout_p=adapter.dropout_p,
                overwrite=is_ours,
            )
            if adapter.bias is not None:
                result = result + adapter.bias.to(result.dtype)
        else:
            result = _dora_over(result, x, adapter, base)
        is_ours = True
    return result


def with_one_adapter(adapters: list[Adapter]) -> Adapter | None:
    """Return one adapter that does what they do: itself, or LoRA without dropout of their ranks' sum."""
    if len(adapters) == 1:
        return adapters[0]
    if any(is_dropping(a.dropout_p) or a.magnitude is not None or a.bias is not None for a in adapters):
        return None
    A = torch.cat([adapter.lora_A for adapter in adapters])
    B = torch.cat([adapter.lora_B * adapter.scaling for adapter in adapters], dim=1)
    return Adapter(adapters[0].name, A, B, None, 1.0, 0.0, None)


def _dora_over(result: Tensor, x: Tensor, adapter: Adapter, base: Base) -> Tensor:
    """DoRA over a result that is there, by the formulas of the module's docstring."""
    assert adapter.magnitude is not None
    with torch.no_grad():
        weight = base.weight().to(x.dtype)
        squared = row_norm_squared(weight)
        norm = row_norm(weight, adapter.lora_A, adapter.lora_B, adapter.scaling, squared)
    # In fp32: near 1, where the row scale lives, 16 bits cannot tell a step of the magnitude from none.
    c = row_scale(adapter.magnitude, norm)
    drops_base = is_dropping(adapter.dropout_p) and adapter.dropout_on_base
    below = result
    if drops_base:
        x = dropped(x, adapter.dropout_p)
        below = base.product(x).to(result.dtype)
    if base.bias is not None:
        below = below - base.bias.to(result.dtype)
    z = lora_add(
        below,
        x,
        adapter.lora_A,
        adapter.lora_B,
        scaling=adapter.scaling,
        dropout_p=0.0 if drops_base else adapter.dropout_p,
    )
    if base.bias is None and not drops_base:
        return (z * c).to(result.dtype)
    # The change alone is added: a fresh adapter (B = 0, c = 1) leaves the result as it is, to the bit.
    return (result + (z * (c - 1.0) + (z - below))).to(result.dtype)
