"""The weight that computes what a linear and its adapters compute: ``W' = c (W + scaling B A)``."""

from __future__ import annotations

from collections.abc import Sequence

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
    dtype = accumulation_dtype(weight.dtype)
    scales = [
        None
        if a.magnitude is None
        else row_scale(a.magnitude, row_norm(weight, a.lora_A, a.lora_B, a.scaling, row_norm_squared(weight)))
        for a in adapters
    ]
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows_at_a_time = max(1, BLOCK_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows_at_a_time):
        rows = slice(start, start + rows_at_a_time)
        block = weight[rows].to(dtype, copy=True)
        for adapter, c in zip(adapters, scales, strict=True):
            block.addmm_(adapter.lora_B[rows].to(dtype), adapter.lora_A.to(dtype), alpha=adapter.scaling)
            if c is not None:
                block.mul_(c[rows, None])
        merged[rows] = block
    return merged
