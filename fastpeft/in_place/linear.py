"""The forward of PEFT's LoRA linears, whatever is active, merged, disabled or swapped at the moment.

The numbers are :mod:`fastpeft.layers.adapted`'s. Here is decided, at every call, whether they are ours to
compute, and which way; what is not goes to PEFT's own forward, for a reason that the model's report gives.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.in_place.adapters import (
    global_hooks,
    has_hooks,
    is_activated,
    is_plain,
    is_replaced,
    names_in,
    parameter_of,
    read,
)
from fastpeft.in_place.record import Layer
from fastpeft.layers.adapted import Adapter, Base, added_linear, fused_linear, suppressed
from fastpeft.layers.kinds import is_conv1d
from fastpeft.layers.rows import added_by_row
from fastpeft.layers.subclass import numbers_of
from fastpeft.ops._common import autocast_is_on

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def linear_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What ``module(x)`` computes, for a PEFT layer whose lora_A and lora_B are linears."""
    layer: Layer = module._fastpeft_layer
    y = _forward(module, layer, x, args, kwargs)
    if layer.response is None:
        return y
    return suppressed(module.base_layer(x, *args, **_for_base(kwargs)), y, layer.response)


def _forward(module: Any, layer: Layer, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    names = kwargs.get("adapter_names")
    if module._disable_adapters or (module.merged_adapters and names is None):
        module._check_forward_args(x, *args, **kwargs)
        if module._disable_adapters and module.merged_adapters:
            module.unmerge()
        layer.calls.count("base")
        return module.base_layer(x, *args, **_for_base(kwargs))  # type: ignore[no-any-return]
    if args or (kwargs and any(value is not None for value in _for_base(kwargs).values())):
        return _peft(
            module, f"called with {', '.join(_for_base(kwargs)) or 'more arguments'}", x, *args, **kwargs
        )
    if names is not None:
        module._check_forward_args(x, adapter_names=names)
        return _by_row(module, x, names, kwargs)
    offsets = kwargs.get("alora_offsets")
    if layer.siblings is not None and offsets is None:
        siblings, name = layer.siblings
        together: Tensor | None = siblings.result(name, x)
        if together is not None:
            layer.calls.count("fused")
            return together
    known = names_in(module)
    active = [name for name in module.active_adapters if name in known]
    base = module._modules["base_layer"]
    if not active:
        layer.calls.count("base")
        return base(x)  # type: ignore[no-any-return]
    if module.lora_variant and any(is_activated(module, name) for name in active):
        if len(active) > 1:
            return _peft(module, "several active adapters, one of them an activated LoRA", x, **kwargs)
        return _by_row(module, x, active * len(x), kwargs)
    adapters = []
    for name in active:
        adapter = read(module, name)
        if isinstance(adapter, str):
            return _peft(module, adapter, x, **kwargs)
        adapters.append(adapter)
    if (problem := unfit(module, x, adapters)) is not None:
        return _peft(module, problem, x, **kwargs)
    # Several of AdaLoRA's are added in turn, as PEFT does it: one product of all their ranks rounds
    # otherwise, which PEFT's own tests of mixed models can tell.
    in_turn = len(adapters) > 1 and "lora_E" in module._modules
    weight = None if in_turn else _fusable_weight(base, x, adapters[0])
    if weight is None:
        layer.calls.count("added")
        return added_linear(x, adapters, _base(module))
    layer.calls.count("fused")
    stored, bias = parameter_of(base, "weight"), parameter_of(base, "bias")
    assert stored is not None
    return fused_linear(x, stored, weight, bias, adapters, layer.norm_cache, lambda: _base(module))


def _by_row(module: Any, x: Tensor, names: list[str], kwargs: dict[str, Any]) -> Tensor:
    """Each row of x by the adapter it names; activated LoRA's for its last tokens."""
    known = names_in(module)
    adapters = []
    for name in dict.fromkeys(names):
        if name not in known:
            continue
        adapter = read(module, name)
        problem = adapter if isinstance(adapter, str) else unfit(module, x, [adapter])
        if isinstance(adapter, str) or problem is not None:
            return _peft(module, str(problem), x, **kwargs)
        if adapter.bias is not None or x.dim() > 3:
            return _peft(module, "rows of their own adapters with lora_bias or more axes", x, **kwargs)
        adapters.append(adapter)
    result: Tensor = module.base_layer(x)
    module._fastpeft_layer.calls.count("added" if adapters else "base")
    last = None
    if any(is_activated(module, name) for name in names):
        offsets = kwargs.get("alora_offsets") or [0] * len(names)
        pairs = zip(names, offsets, strict=True)
        last = [int(offset or 0) if is_activated(module, name) else None for name, offset in pairs]
    return added_by_row(result, x, names, adapters, _base(module), last, drops=True)


def _peft(module: Any, reason: str, *args: Any, **kwargs: Any) -> Tensor:
    module._fastpeft_layer.calls.count("peft", reason)
    return type(module).forward(module, *args, **kwargs)  # type: ignore[no-any-return]


def _for_base(kwargs: dict[str, Any]) -> dict[str, Any]:
    """PEFT's own keywords do not reach the base layer."""
    return {name: value for name, value in kwargs.items() if name not in ("adapter_names", "alora_offsets")}


def _base(module: Any) -> Base:
    base = module.base_layer
    own_product = type(base) is nn.Linear and not has_hooks(base) and not is_replaced(base)

    def weight() -> Tensor:
        return base_weight(module)

    return Base(product=base, bias=module.get_base_layer().bias, weight=weight, is_ours=own_product)


def base_weight(module: Any) -> Tensor:
    """Return the weight [out_features, in_features] below a PEFT layer's adapters, as numbers."""
    inner = module.get_base_layer()
    if type(inner.weight).__name__ in ("Params4bit", "Int8Params"):
        # Not by PEFT's way, which puts another Parameter into the layer: on a CPU an int8 one without its
        # scales, so that the next forward fails.
        return numbers_of(inner)
    if (type(inner) is nn.Linear or is_conv1d(inner)) and is_plain(inner.weight):
        numbers: Tensor = inner.weight
    else:  # by PEFT's own way for every other kind of quantisation, which torch.compile cannot trace
        numbers = sys.modules["peft.utils.integrations"].dequantize_module_weight(inner)
    return numbers.t() if is_conv1d(inner) else numbers


def _compute_dtype(x: Tensor) -> torch.dtype:
    if autocast_is_on(x) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def unfit(module: Any, x: Tensor, adapters: list[Adapter]) -> str | None:
    """Why the adapters cannot be ours for this x."""
    if global_hooks():
        return "global module hooks"
    if x.is_nested:
        return "a nested tensor"
    if not x.is_floating_point():
        return f"an input of {x.dtype}"
    dtype = _compute_dtype(x)
    width = x.shape[-1]
    for adapter in adapters:
        A = adapter.lora_A
        own = A.dtype
        if own is not adapter.lora_B.dtype or not (own is dtype or own is torch.float32):
            return f"{own} adapters under an input of {dtype}"
        if own is not dtype and dtype not in _SIXTEEN_BITS:
            return f"{own} adapters under an input of {dtype}"
        if own is not x.dtype and not module.cast_input_dtype_enabled:
            return "input dtype casting disabled"
        if A.shape[1] != width:
            return "lora_A is a shard, or x of another width"
    return None


def _fusable_weight(base: Any, x: Tensor, adapter: Adapter) -> Tensor | None:
    """Return the base's weight as [out_features, in_features] where its product can be ours, else None."""
    transposed = type(base) is not nn.Linear
    if transposed and not is_conv1d(base):
        return None
    if has_hooks(base) or is_replaced(base):
        return None
    weight = parameter_of(base, "weight")
    if weight is None or not is_plain(weight) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if weight.requires_grad and torch.is_grad_enabled():
        return None  # autograd's own product is the best for a weight that trains
    if weight.dtype is not x.dtype and not autocast_is_on(x):
        return None
    if weight.element_size() < 2 or weight.device != x.device or adapter.lora_A.device != x.device:
        return None
    weight = weight.t() if transposed else weight
    if weight.shape != (adapter.lora_B.shape[0], adapter.lora_A.shape[1]):
        return None
    return weight
