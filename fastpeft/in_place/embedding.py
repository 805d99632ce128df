"""The forward of PEFT's LoRA embeddings: ``W[x] + scaling * A^T[x] B^T``, and DoRA's ``m/n`` times it.

The update is added in the pass of its product: PEFT makes the product, scales it and adds it, in three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.in_place.adapters import has_hooks, is_plain
from fastpeft.in_place.record import Layer
from fastpeft.ops.row_norm import row_norm, row_norm_squared, row_scale


def embedding_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What ``module(x)`` computes, for PEFT's LoRA embedding and token ids x [...]."""
    layer: Layer = module._fastpeft_layer
    if (reason := _not_ours(module, args, kwargs)) is not None:
        layer.calls.count("peft", reason)
        return type(module).forward(module, x, *args, **kwargs)  # type: ignore[no-any-return]
    result: Tensor = module.base_layer(x)
    if module._disable_adapters or module.merged_adapters:
        layer.calls.count("base")
        return result
    active = [name for name in module.active_adapters if name in module.lora_embedding_A]
    embed_scale = module._get_embed_scale() if active else None
    for name in active:
        result = _with_adapter(module, layer, result, x, name, embed_scale)
    layer.calls.count("added" if active else "base")
    return result


def _not_ours(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if args or any(value is not None for value in kwargs.values()):
        return f"called with {', '.join(kwargs) or 'more arguments'}"
    if module._disable_adapters and module.merged_adapters:
        return "adapters disabled while merged"
    if module.get_base_layer().max_norm is not None:
        return "an embedding with max_norm, which writes its weight"
    if any(module.input_fns.get(n) or module.output_fns.get(n) for n in module.active_adapters):
        return "tensor-parallel embedding"
    for name in module.active_adapters:
        if name not in module.lora_embedding_A:
            continue
        if not is_plain(module.lora_embedding_A[name]) or not is_plain(module.lora_embedding_B[name]):
            return "lora_embedding_A or B is not a plain tensor"
        if (variant := module.lora_variant.get(name)) is None:
            continue
        if type(variant).__name__ != "DoraEmbeddingVariant" or has_hooks(module.lora_magnitude_vector[name]):
            return f"variant {type(variant).__name__.removesuffix('Variant')}"
    return None


def _with_adapter(
    module: Any, layer: Layer, result: Tensor, x: Tensor, name: str, embed_scale: Tensor | None
) -> Tensor:
    A, B, scaling = module.lora_embedding_A[name], module.lora_embedding_B[name], module.scaling[name]
    dtype, shape = result.dtype, result.shape
    rows = module._embed(x, A.T).to(dtype).reshape(-1, A.shape[0])  # [tokens, r]
    right = B.t().to(dtype)
    flat, own_scaling = result.reshape(-1, shape[-1]), scaling
    if isinstance(scaling, Tensor):  # as in a hot-swap compiled for many adapters
        right, scaling = right * scaling.to(dtype), 1.0
    if embed_scale is not None:
        right = right * embed_scale.to(dtype)
    if module.lora_variant.get(name) is None:
        return torch.addmm(flat, rows, right, alpha=scaling).view(shape)
    base = module.get_base_layer()
    weight = base.weight.t()
    norm = None
    if not isinstance(own_scaling, Tensor):
        norm = layer.norm_cache(name).norm(base.weight, weight, A, B, scaling)
    if norm is None:
        with torch.no_grad():
            right_B, factor = (B * own_scaling, 1.0) if isinstance(own_scaling, Tensor) else (B, scaling)
            norm = row_norm(weight, A, right_B, factor, row_norm_squared(weight))
    c = row_scale(module.lora_magnitude_vector[name].weight, norm)
    return (torch.addmm(flat, rows, right, alpha=scaling) * c).to(dtype).view(shape)
