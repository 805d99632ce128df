"""The forward of PEFT's LoRA linears, whatever is active, merged, disabled or swapped at the moment.

PEFT's formula, adapter by adapter over an accumulated result:

    LoRA   result = result + scaling * B A drop(x)
    DoRA   result = result + (m/n - 1) * (result - bias) + (m/n) * scaling * B A x

The first adapter is fused with the base product where the base is a plain linear; several LoRA adapters
without dropout are one of their ranks' sum. What is computed elsewhere is the base's own product, with our
update added (quantised bases), or PEFT's forward, for a reason that the model's report gives.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.in_place.adapters import Adapter, global_hooks, has_hooks, is_plain, is_replaced, read
from fastpeft.in_place.record import Layer
from fastpeft.layers.kinds import is_conv1d
from fastpeft.ops._common import autocast_is_on
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_add import lora_add
from fastpeft.ops.row_norm import row_norm, row_norm_squared, row_scale

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def linear_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What ``module(x)`` computes, for a PEFT layer whose lora_A and lora_B are linears."""
    layer: Layer = module._fastpeft_layer
    if module._disable_adapters or module.merged_adapters:
        if (module._disable_adapters and module.merged_adapters) or kwargs.get("adapter_names") is not None:
            return _peft(module, "adapters disabled while merged, or adapter_names", x, *args, **kwargs)
        layer.calls.count("base")
        return module.base_layer(x, *args, **_for_base(kwargs))  # type: ignore[no-any-return]
    if args or any(value is not None for value in kwargs.values()):
        names = ", ".join(kwargs) or "more arguments"
        return _peft(module, f"called with {names}", x, *args, **kwargs)
    known = module._modules["lora_A"]._modules
    active = [name for name in module.active_adapters if name in known]
    base = module._modules["base_layer"]
    if not active:
        layer.calls.count("base")
        return base(x)  # type: ignore[no-any-return]
    adapters = []
    for name in active:
        adapter = read(module, name)
        if isinstance(adapter, str):
            return _peft(module, adapter, x)
        adapters.append(adapter)
    if (problem := _unfit(module, x, adapters)) is not None:
        return _peft(module, problem, x)
    weight = _fusable_weight(base, x, adapters[0])
    if (problem := _unfit_above(base, adapters if weight is None else adapters[1:])) is not None:
        return _peft(module, problem, x)
    if weight is not None:
        result, rest = _fused(layer, base, weight, x, adapters)
        layer.calls.count("fused")
        # DoRA keeps its output for backward.
        return _added(module, result, x, rest, ours=adapters[0].magnitude is None)
    result = base(x)
    if result.dtype != _compute_dtype(x) or result.shape[:-1] != x.shape[:-1]:
        return _peft(module, f"a base that turns {x.dtype} into {result.dtype}, or the shape", x)
    layer.calls.count("added")
    return _added(module, result, x, adapters, ours=type(base) is nn.Linear and not has_hooks(base))


def _peft(module: Any, reason: str, *args: Any, **kwargs: Any) -> Tensor:
    module._fastpeft_layer.calls.count("peft", reason)
    return type(module).forward(module, *args, **kwargs)  # type: ignore[no-any-return]


def _for_base(kwargs: dict[str, Any]) -> dict[str, Any]:
    """PEFT's own keywords do not reach the base layer."""
    return {name: value for name, value in kwargs.items() if name not in ("adapter_names", "alora_offsets")}


def _compute_dtype(x: Tensor) -> torch.dtype:
    if autocast_is_on(x.device.type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _unfit(module: Any, x: Tensor, adapters: list[Adapter]) -> str | None:
    """Why the adapters cannot be ours for this x."""
    if global_hooks():
        return "global module hooks"
    if not x.is_floating_point():
        return f"an input of {x.dtype}"
    dtype = _compute_dtype(x)
    for adapter in adapters:
        own = adapter.lora_A.dtype
        if own is not adapter.lora_B.dtype or own not in (dtype, torch.float32):
            return f"{own} adapters under an input of {dtype}"
        if own is torch.float32 and dtype not in (*_SIXTEEN_BITS, torch.float32):
            return f"{own} adapters under an input of {dtype}"
        if own is not x.dtype and not module.cast_input_dtype_enabled:
            return "input dtype casting disabled"
        if adapter.lora_A.shape[1] != x.shape[-1]:
            return "lora_A is a shard, or x of another width"
    return None


def _fusable_weight(base: Any, x: Tensor, adapter: Adapter) -> Tensor | None:
    """Return the base's weight as [out_features, in_features] where its product can be ours, else None."""
    transposed = is_conv1d(base)
    if not transposed and type(base) is not nn.Linear:
        return None
    if has_hooks(base) or is_replaced(base):
        return None
    weight: Tensor = base.weight
    if not is_plain(weight) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if weight.requires_grad and torch.is_grad_enabled():
        return None  # autograd's own product is the best for a weight that trains
    if weight.dtype is not x.dtype and not autocast_is_on(x.device.type):
        return None
    if weight.element_size() < 2 or weight.device != x.device or adapter.lora_A.device != x.device:
        return None
    weight = weight.t() if transposed else weight
    if weight.shape != (adapter.lora_B.shape[0], adapter.lora_A.shape[1]):
        return None
    return weight


def _fused(
    layer: Layer, base: Any, weight: Tensor, x: Tensor, adapters: list[Adapter]
) -> tuple[Tensor, list[Adapter]]:
    """Return the base product with one adapter (or all of them, stacked), and those that are left."""
    first, rest = adapters[0], adapters[1:]
    if rest and not any(a.dropout_p or a.magnitude is not None or a.bias is not None for a in adapters):
        first, rest = _stacked(adapters), []
    bias: Tensor | None = base.bias
    if first.bias is not None:
        bias = first.bias.to(x.dtype) if bias is None else bias + first.bias.to(bias.dtype)
    if first.magnitude is None:
        y = lora_linear(
            x, weight, bias, first.lora_A, first.lora_B, scaling=first.scaling, dropout_p=first.dropout_p
        )
        return y, rest
    norm = layer.norm_cache(first.name).norm(base.weight, weight, first.lora_A, first.lora_B, first.scaling)
    y = dora_linear(
        x,
        weight,
        bias,
        first.lora_A,
        first.lora_B,
        first.magnitude,
        scaling=first.scaling,
        dropout_p=first.dropout_p,
        norm=norm,
    )
    return y, rest


def _stacked(adapters: list[Adapter]) -> Adapter:
    """LoRA adapters without dropout as one whose rank is the sum of theirs."""
    A = torch.cat([adapter.lora_A for adapter in adapters])
    B = torch.cat([adapter.lora_B * adapter.scaling for adapter in adapters], dim=1)
    return Adapter(adapters[0].name, A, B, None, 1.0, 0.0, None)


def _unfit_above(base: nn.Module, adapters: list[Adapter]) -> str | None:
    """Why PEFT must compute the adapters over a base product that is not ours."""
    for adapter in adapters:
        if adapter.magnitude is not None and adapter.dropout_p:
            return f"DoRA with dropout over {type(base).__name__}: a second product with its weight"
    return None


def _added(module: Any, result: Tensor, x: Tensor, adapters: list[Adapter], *, ours: bool) -> Tensor:
    """Return the result with one adapter after the other; ``ours``: nobody else reads it."""
    for adapter in adapters:
        if adapter.magnitude is None:
            result = lora_add(
                result,
                x,
                adapter.lora_A,
                adapter.lora_B,
                scaling=adapter.scaling,
                dropout_p=adapter.dropout_p,
                overwrite=ours,
            )
            if adapter.bias is not None:
                result = result + adapter.bias.to(result.dtype)
        else:
            result = _dora_above(module, result, x, adapter)
        ours = True
    return result


def _dora_above(module: Any, result: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """PEFT's DoRA over an accumulated result; dropout is off, or _unfit_above has refused."""
    base = module.get_base_layer()
    bias = base.bias
    with torch.no_grad():
        weight = _dequantised(base).to(_compute_dtype(x))
        weight = weight.t() if is_conv1d(base) else weight
        squared = row_norm_squared(weight)
        norm = row_norm(weight, adapter.lora_A, adapter.lora_B, adapter.scaling, squared)
    assert adapter.magnitude is not None
    z = lora_add(
        result if bias is None else result - bias.to(result.dtype),
        x,
        adapter.lora_A,
        adapter.lora_B,
        scaling=adapter.scaling,
        overwrite=bias is not None,
    )
    # In fp32: near 1, where the row scale lives, 16 bits cannot tell a step of the magnitude from none.
    scaled = z * row_scale(adapter.magnitude, norm)
    return (scaled if bias is None else scaled + bias).to(result.dtype)


def _dequantised(base: nn.Module) -> Tensor:
    """Return the base's weight as numbers, by PEFT's own way for every kind of quantisation."""
    weight: Tensor = sys.modules["peft.utils.integrations"].dequantize_module_weight(base)
    return weight
