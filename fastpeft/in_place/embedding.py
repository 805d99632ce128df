"""The forward of PEFT's LoRA embeddings, whatever is active, merged, disabled or swapped at the moment.

The numbers are :mod:`fastpeft.layers.embedding`'s; what is not ours goes to PEFT's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpeft.in_place.adapters import has_hooks, is_plain, is_replaced
from fastpeft.in_place.record import Layer
from fastpeft.layers.adapted import suppressed
from fastpeft.layers.embedding import embedding_row_scale, embedding_with_adapter


def embedding_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What ``module(x)`` computes, for PEFT's LoRA embedding and token ids x [...]."""
    response = module._fastpeft_layer.response
    y = _forward(module, x, *args, **kwargs)
    return y if response is None else suppressed(module.base_layer(x), y, response)


def _forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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
    given = [name for name, value in kwargs.items() if value is not None and name != "alora_offsets"]
    if args or given:
        return f"called with {', '.join(given) or 'more arguments'}"
    if module._disable_adapters and module.merged_adapters:
        return "adapters disabled while merged"
    if module.get_base_layer().max_norm is not None:
        return "an embedding with max_norm, which writes its weight"
    if any(module.input_fns.get(n) or module.output_fns.get(n) for n in module.active_adapters):
        return "tensor-parallel embedding"
    for name in module.active_adapters:
        if name not in module.lora_embedding_A:
            continue
        A, B = module.lora_embedding_A[name], module.lora_embedding_B[name]
        if not is_plain(A) or not is_plain(B):
            return "lora_embedding_A or B is not a plain tensor"
        if A.dim() != 2 or B.dim() != 2 or B.shape[1] != A.shape[0] or A.shape[1] != module.in_features:
            return "lora_embedding_A or B is a shard"  # FSDP1's flat parameters
        if (variant := module.lora_variant.get(name)) is None:
            continue
        if type(variant).__name__ != "DoraEmbeddingVariant":
            return f"variant {type(variant).__name__.removesuffix('Variant')}"
        layer = module.lora_magnitude_vector[name]
        if has_hooks(layer) or is_replaced(layer):
            return "hooks on the magnitude"
        if not is_plain(layer.weight) or layer.weight.shape != (B.shape[0],):
            return "the magnitude is a shard"
    return None


def _with_adapter(
    module: Any, layer: Layer, result: Tensor, x: Tensor, name: str, embed_scale: Tensor | None
) -> Tensor:
    A, B, scaling = module.lora_embedding_A[name], module.lora_embedding_B[name], module.scaling[name]
    rows = module._embed(x, A.T)
    c = None
    if module.lora_variant.get(name) is not None:
        m = module.lora_magnitude_vector[name].weight
        cache = None if torch.compiler.is_compiling() else layer.norm_cache(name)  # compiled code has none
        c = embedding_row_scale(module.get_base_layer().weight, A, B, m, scaling, cache)
    return embedding_with_adapter(result, rows, B, scaling, embed_scale, c)
