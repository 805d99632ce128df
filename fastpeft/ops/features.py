"""Row scaling and column sums over [tokens, features] in the fewest passes, without fp32 copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpeft.ops._common import accumulation_dtype
from fastpeft.ops.products import RowScale

# Of a temporary. Above 32 MiB glibc maps and unmaps it at every use: a sum of 2048 x 4096 then takes 11 ms
# instead of 3, all of it page faults.
CHUNK_ELEMENTS = 2**20
# How far from 1 a row scale may lie for one pass without fp32.
NEAR = 0.25


def scale_features(y: Tensor, scale: RowScale, *, out: Tensor | None = None) -> Tensor:
    """Return ``y * c`` for y [tokens, features] and the scale's c [features], in y's dtype.

    ``c`` is not rounded to y's dtype first: near 1, where DoRA's row scale lives, bf16 cannot tell a step of
    the magnitude from none. On a CPU a mixed-dtype product makes fp32 copies of whole tensors (measured 2x
    the time of the pass below, at 512 x 2048), so ``c`` is applied as ``y + y * (c - 1)`` with ``c - 1`` in
    16 bits where it lies within ``NEAR`` of 1 (error at most a quarter of y's own rounding). Features beyond
    that are taken out and multiplied in fp32, so that no feature's bits depend on another's scale.
    """
    out, c = torch.empty_like(y) if out is None else out, scale.c
    if y.dtype == c.dtype or not y.is_cpu:
        return torch.mul(y, c, out=out)
    excess = c - 1.0
    if scale.is_near or not (is_far := excess.abs() > NEAR).any():
        return torch.addcmul(y, y, excess.to(y.dtype), out=out)
    far = is_far.nonzero().squeeze(1)
    # Before the pass, which may be in place; by runs of rows, for the fp32 copy stays small.
    scaled = [(rows[:, far].float() * c[far]).to(y.dtype) for (rows,) in _chunks(y)]
    torch.addcmul(y, y, excess.to(y.dtype), out=out)
    out[:, far] = torch.cat(scaled)
    return out


def feature_sum(a: Tensor) -> Tensor:
    """Return ``colsum(a)`` [features] for a [tokens, features], summed in fp32 (fp64)."""
    dtype = accumulation_dtype(a.dtype)
    parts = [rows.sum(0, dtype=dtype) for (rows,) in _chunks(a)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def feature_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``colsum(a * b)`` [features] for a, b [tokens, features], summed in fp32 (fp64).

    Tried and lost: 16-bit sums of runs of rows, then fp32 over the runs. 0.52 ms instead of 0.78 at
    1024 x 2048, but a second rounding, which took DoRA's dm past twice plain PyTorch's error.
    """
    dtype = accumulation_dtype(a.dtype)
    if a.numel() <= CHUNK_ELEMENTS:
        return (a * b).sum(0, dtype=dtype)
    total = torch.zeros(a.shape[1], dtype=dtype, device=a.device)
    for a_rows, b_rows in _chunks(a, b):
        total += (a_rows * b_rows).sum(0, dtype=dtype)
    return total


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors by runs of rows of at most about ``CHUNK_ELEMENTS``; on a GPU, whole."""
    rows, features = tensors[0].shape
    if tensors[0].is_cpu:
        rows = min(rows, max(1, CHUNK_ELEMENTS // max(features, 1)))
    return zip(*(torch.split(tensor, max(rows, 1)) for tensor in tensors), strict=True)
