"""A linear as the block ops take it, whoever keeps it: a drop-in module, PEFT's layer, or a plain linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.in_place import linear as pefts
from fastpeft.in_place.adapters import (
    global_hooks,
    has_hooks,
    is_activated,
    is_plain,
    is_replaced,
    names_in,
    read,
)
from fastpeft.in_place.install import is_accelerated, is_linear_layer
from fastpeft.layers.adapted import Adapter, with_one_adapter
from fastpeft.layers.kinds import is_conv1d, is_conv1d_like, is_quantised
from fastpeft.layers.linear import LinearMixin
from fastpeft.layers.norm_cache import NormCache
from fastpeft.ops._common import autocast_is_on
from fastpeft.ops.probability import LiveProbability, Probability
from fastpeft_kernels.projection import Projection


@dataclass(frozen=True, slots=True)
class View:
    """One linear now.

    Attributes:
        projection: its weight, bias and adapter, if one is active.
        dropout_p: what its adapter drops; None without an adapter, which takes any.
        dropout_on_base: the meaning of DoRA's dropout.
    """

    projection: Projection
    dropout_p: Probability | None
    dropout_on_base: bool


def view_of(layer: nn.Module, x: Tensor) -> View | None:
    """Return the linear as it is for this x, or None where a block op cannot stand for it."""
    if x.is_nested:
        return None
    if isinstance(layer, LinearMixin):
        return _own_view(layer, x)
    if is_accelerated(layer):
        return _pefts_view(layer, x) if is_linear_layer(layer) else None
    if type(layer) is nn.Linear or is_conv1d(layer):
        return None if is_replaced(layer) else _view(layer, layer, x, [], None)
    return None


def own_product(layer: nn.Module) -> str | None:
    """Return why no block op can ever stand for a linear: nobody but its class knows its product."""
    base: Any = layer
    if is_accelerated(layer):
        if not is_linear_layer(layer):
            return "PEFT has its adapters on a Parameter"
        base = layer._modules["base_layer"]
    elif isinstance(layer, LinearMixin):
        if not layer.has_plain_product:
            return f"{type(layer).kind.__name__} has a product of its own"  # type: ignore[attr-defined]
        return None if layer.can_merge() else "its weight is quantised"
    if type(base) is not nn.Linear and not is_conv1d(base):
        return f"{type(base).__name__} has a product of its own"
    return "its weight is quantised" if is_quantised(base.weight) else None


def is_called_bare(layer: nn.Module) -> bool:
    """Whether calling the module does no more than its forward."""
    return not has_hooks(layer) and not global_hooks()


def _own_view(layer: LinearMixin, x: Tensor) -> View | None:
    if layer.row_adapters is not None or layer.response is not None or not layer.has_plain_product:
        return None
    adapters = [] if layer.merged_adapters or not layer.adapters_enabled else layer.adapters()
    return _view(layer, layer, x, adapters, layer)


def _pefts_view(layer: Any, x: Tensor) -> View | None:
    adapters: list[Adapter] = []
    if layer._fastpeft_layer.response is not None:
        return None
    if layer.merged_adapters or layer._disable_adapters:
        if layer.merged_adapters and layer._disable_adapters:
            return None
    else:
        known = names_in(layer)
        for name in layer.active_adapters:
            if name in known:
                if is_activated(layer, name):
                    return None
                adapter = read(layer, name)
                if isinstance(adapter, str):
                    return None
                adapters.append(adapter)
    base = layer._modules["base_layer"]
    if type(base) is not nn.Linear and not is_conv1d(base):
        return None
    if not is_called_bare(base) or is_replaced(base) or pefts.unfit(layer, x, adapters) is not None:
        return None
    return _view(layer, base, x, adapters, layer._fastpeft_layer)


def _view(layer: nn.Module, base: Any, x: Tensor, adapters: list[Adapter], norms: Any) -> View | None:
    """``norms`` has the caches of the adapters' row norms."""
    weight: Tensor = base.weight
    dtype = weight.dtype if not autocast_is_on(x) else x.dtype
    if not is_plain(weight) or weight.dim() != 2 or x.dtype is not dtype or weight.device != x.device:
        return None
    if weight.requires_grad and torch.is_grad_enabled():
        return None
    if is_conv1d_like(base):
        weight = weight.t()
    if weight.shape[1] != x.shape[-1]:
        return None
    bias: Tensor | None = base.bias
    if not adapters:
        return View(Projection(weight=weight, bias=bias), None, True)
    one = with_one_adapter(adapters)
    if one is None or one.lora_A.device != x.device:
        return None
    if one.bias is not None:
        bias = one.bias.to(x.dtype) if bias is None else bias + one.bias.to(bias.dtype)
    norm = None
    if one.magnitude is not None and not torch.compiler.is_compiling():
        cache: NormCache = norms.norm_cache(one.name)
        norm = cache.norm(base.weight, weight, one.lora_A, one.lora_B, one.scaling)
    projection = Projection(
        weight=weight,
        bias=bias,
        lora_A=one.lora_A,
        lora_B=one.lora_B,
        scaling=one.scaling,
        magnitude=one.magnitude,
        norm=norm,
    )
    return View(projection, one.dropout_p, one.dropout_on_base)


def dropout_of(views: list[View]) -> tuple[list[Probability], bool] | None:
    """Return what each drops and its meaning; None where an op cannot do both, or none has an adapter."""
    adapted = [(view.dropout_p, view.dropout_on_base) for view in views if view.dropout_p is not None]
    if not adapted:
        return None
    p, on_base = adapted[0]
    is_live = isinstance(p, LiveProbability)
    if any(isinstance(q, LiveProbability) is not is_live or meaning != on_base for q, meaning in adapted):
        return None
    # Where there is no adapter, any will do; the first one's makes them all the same, as a kernel wants it.
    return [p if view.dropout_p is None else view.dropout_p for view in views], on_base
