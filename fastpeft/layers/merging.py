"""The weight that computes what a linear and its adapters compute: ``W' = c (W + scaling B A)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastpeft.layers.adapted import Adapter
from fastpeft.ops._common import accumulation_dtype
from fastpeft.ops.row_norm import row_norm, row_norm_squared, row_scale

# Of the rows that are in fp32 at a time.
BLOCK_ELEMENTS = 2**22


def merged_weight(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Return [out_features, in_features] in the weight's dtype, computed in fp32 (fp64) and rounded once.

    Several adapters in forward's order: DoRA scales what is there, by a norm of the weight without them.
    """
    dtype, scales = accumulation_dtype(weight.dtype), _row_scales(weight, adapters)
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for rows in _blocks(weight):
        block = weight[rows].to(dtype, copy=True)
        for adapter, c in zip(adapters, scales, strict=True):
            block.addmm_(adapter.lora_B[rows].to(dtype), adapter.lora_A.to(dtype), alpha=adapter.scaling)
            if c is not None:
                block.mul_(c[rows, None])
        merged[rows] = block
    return merged


def weighted_weight(weight: Tensor, adapters: Sequence[Adapter], factors: Sequence[float]) -> Tensor:
    """Return ``W + sum_i f_i (W'_i - W)`` with W'_i what adapter i alone makes of W, rounded once.

    That is f_i scaling B A for LoRA and f_i ((c - 1) W + c scaling B A) for DoRA; their order plays no part.
    """
    dtype, scales = accumulation_dtype(weight.dtype), _row_scales(weight, adapters)
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for rows in _blocks(weight):
        base = weight[rows].to(dtype)
        block = base.clone()
        for adapter, c, factor in zip(adapters, scales, factors, strict=True):
            B = adapter.lora_B[rows].to(dtype)
            if c is not None:
                B = B * c[rows, None]
                block.addcmul_(base, c[rows, None] - 1.0, value=factor)
            block.addmm_(B, adapter.lora_A.to(dtype), alpha=factor * adapter.scaling)
        merged[rows] = block
    return merged


def _row_scales(weight: Tensor, adapters: Sequence[Adapter]) -> list[Tensor | None]:
    """DoRA's row scale of each, None for LoRA."""
    return [
        None
        if a.magnitude is None
        else row_scale(a.magnitude, row_norm(weight, a.lora_A, a.lora_B, a.scaling, row_norm_squared(weight)))
        for a in adapters
    ]


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Yield the rows that are in fp32 at a time."""
    step = max(1, BLOCK_ELEMENTS // max(weight.shape[1], 1))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
