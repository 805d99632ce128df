"""What backward takes from dY besides dx: dS, dB, dbias and dm, in one read of it or in two."""

from __future__ import annotations

import torch
from torch import Tensor

from .down_projection import down_projection
from .grad_a import grad_a
from .grad_s_b import grad_s_b, max_rank
from .primitives import KeptProduct, RowScale


def reduce_dy(
    dy: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    *,
    need_S: bool,
    need_B: bool,
    bias_dtype: torch.dtype | None,
    row_scale: RowScale | None = None,
    kept: KeptProduct | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`dS = s (c * dY) B`, `dB = s (c * dY)^T S`, `dbias = colsum(dY)`, `dm`; None for what is not asked for.

    One read of dY where the rank allows it, else one for dS and one for the rest. dbias is asked for by its
    dtype and dm by `kept`. Both come with dB's read, so dB is made and dropped where only they are wanted, or
    only `row_scale.c`, which that read fills.
    """
    need_columns = need_B or bias_dtype is not None or kept is not None or row_scale is not None
    if need_S and need_columns and lora_B.shape[1] <= max_rank(dy, row_scale):
        dS, dB, dbias, dm = grad_s_b(
            dy, lora_B, S, scaling, dtype=lora_B.dtype, bias_dtype=bias_dtype, row_scale=row_scale, kept=kept
        )
        return dS, dB if need_B else None, dbias, dm
    columns: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if need_columns:
        columns = grad_a(
            dy,
            S,
            scaling,
            dtype=lora_B.dtype,
            columns_first=True,
            sum_dtype=bias_dtype,
            row_scale=row_scale,
            kept=kept,
        )
    c = row_scale.c if row_scale is not None else None
    only_S = down_projection(dy, lora_B.t(), scaling, c=c) if need_S else None
    return only_S, columns[0] if need_B else None, columns[1], columns[2]
