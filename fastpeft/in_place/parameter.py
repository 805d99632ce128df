"""The forward of PEFT's LoRA on a Parameter (``target_parameters``): stacked experts, or any other weight.

Whose forward multiplies by that Parameter is not ours to know. While it runs, it finds in the Parameter's
place a stand-in (:mod:`fastpeft.layers.factored`) that computes products with ``W + s B A`` from the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.in_place.adapters import is_plain
from fastpeft.in_place.record import Layer
from fastpeft.layers.factored import FactoredWeight


def parameter_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What ``module(x, ..)`` computes, for PEFT's ParamWrapper."""
    layer: Layer = module._fastpeft_layer
    if (reason := _not_ours(module, kwargs)) is not None:
        layer.calls.count("peft", reason)
        return type(module).forward(module, x, *args, **kwargs)
    kwargs.pop("adapter_names", None)  # None: the base's forward knows no such argument
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module._disable_adapters or module.merged_adapters or not active:
        layer.calls.count("base")
        return module.base_layer(x, *args, **kwargs)
    weight = _stand_in(module, active, layer.response)
    # An attribute of the instance is found before its Parameters; who lists those finds them as ever.
    attributes, name = module.get_base_layer().__dict__, module.parameter_name
    attributes[name] = weight
    try:
        result = module.base_layer(x, *args, **kwargs)
    finally:
        attributes.pop(name, None)
    if weight.formed_for:
        layer.calls.count("peft", f"{name} + B A formed for {', '.join(dict.fromkeys(weight.formed_for))}")
    else:
        layer.calls.count("fused")
    return result


def _not_ours(module: Any, kwargs: dict[str, Any]) -> str | None:
    """Why PEFT's own forward is to run."""
    if torch.compiler.is_compiling():
        return "compiled"
    if kwargs.get("adapter_names") is not None:
        return "called with adapter_names"
    if module._disable_adapters and module.merged_adapters:
        return "adapters disabled while merged"
    holder, name = module.get_base_layer(), module.parameter_name
    weight = holder._parameters.get(name)
    if weight is None or name in holder.__dict__:
        return f"{name} is not a Parameter of {type(holder).__name__} alone"
    if hasattr(weight, "ds_id"):
        return f"{name} is partitioned by DeepSpeed's ZeRO-3"
    if not is_plain(weight) or not weight.is_floating_point() or weight.element_size() < 2:
        return f"{name} is {type(weight).__name__} of {weight.dtype}"
    if weight.dim() == 3 and module.num_experts == 1:
        return "a stack of one expert"
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        for what in ("lora_A", "lora_B"):
            factor = getattr(module, what)[adapter].weight
            if not is_plain(factor) or factor.dim() != 2 or hasattr(factor, "ds_id"):
                return f"{what} is a shard"
    return None


def _stand_in(module: Any, active: list[str], response: Tensor | None) -> FactoredWeight:
    """Return the Parameter with the active adapters on it, their ranks side by side."""
    weight: nn.Parameter = module.get_base_layer()._parameters[module.parameter_name]
    lefts, rights, scalings = zip(*(_factors(module, name, weight.dim()) for name in active), strict=True)
    scaling = 1.0
    if len(active) == 1 and not isinstance(scalings[0], Tensor):
        left, right, scaling = lefts[0], rights[0], scalings[0]
    else:
        left = torch.cat([left * s for left, s in zip(lefts, scalings, strict=True)], dim=-1)
        right = torch.cat(rights, dim=-2)
    if response is not None:
        left = left * response
    return FactoredWeight.of(weight, left, right, scaling)


def _factors(module: Any, name: str, dim: int) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return L and R of PEFT's ``scaling * L R`` in the adapter's own dtype, and the scaling."""
    A, B, scaling = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    if dim == 2:
        return B, A, scaling
    # PEFT stacks the experts' A one below the other, and interleaves the columns of their B.
    A = A.reshape(module.num_experts, -1, A.shape[-1])  # [experts, r, in_features]
    # Taken apart as a transposed matrix: torch copies those by blocks, a permutation element by element.
    apart = B.reshape(-1, module.num_experts).t().contiguous()
    B = apart.reshape(module.num_experts, B.shape[0], -1)  # [experts, out_features, r]
    # Swapped are those whose experts have [out_features, in_features], as nn.Linear has.
    return (B, A, scaling) if module._did_swap_in_out_features else (A.mT, B.mT, scaling)
