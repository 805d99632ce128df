"""Row scaling and column sums over [tokens, features] in the fewest passes, without fp32 copies."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops._common import accumulation_dtype

CHUNK_ROWS = 128  # 128 x 2048 in fp32 is 1 MiB: a chunk stays in the second-level cache


def scale_features(y: Tensor, c: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``y * c`` for y [tokens, features] and an fp32 (fp64) ``c`` [features], in y's dtype.

    ``c`` is not rounded to y's dtype first: near 1, where DoRA's row scale lives, bf16 cannot tell a step of
    the magnitude from none. On a CPU a mixed-dtype product makes fp32 copies of whole tensors (measured 2x
    the time of the pass below, at 512 x 2048), so c is applied as ``y + y * (c - 1)`` with ``c - 1`` in
    16 bits while every c lies within 1/2 of 1 (error at most half of y's own rounding), and in cache-sized
    fp32 chunks otherwise.
    """
    out = torch.empty_like(y) if out is None else out
    if y.dtype == c.dtype or not y.is_cpu:
        return torch.mul(y, c, out=out)
    excess = c - 1.0
    if y.numel() == 0 or excess.abs().max() <= 0.5:
        return torch.addcmul(y, y, excess.to(y.dtype), out=out)
    for rows, target in zip(torch.split(y, CHUNK_ROWS), torch.split(out, CHUNK_ROWS), strict=True):
        torch.mul(rows, c, out=target)
    return out


def feature_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``colsum(a * b)`` [features] for a, b [tokens, features], summed in fp32 (fp64)."""
    dtype = accumulation_dtype(a.dtype)
    total = torch.zeros(a.shape[1], dtype=dtype, device=a.device)
    rows = CHUNK_ROWS if a.is_cpu else max(a.shape[0], 1)
    for a_rows, b_rows in zip(torch.split(a, rows), torch.split(b, rows), strict=True):
        total += (a_rows * b_rows).sum(0, dtype=dtype)
    return total
