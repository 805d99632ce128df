"""`out = scale * l^T drop(x)`, a sum over tokens: `dA = dS^T drop(x)`, and `dB^T = s S^T dY` when r is large.

The sum runs over all M tokens while the result is only [r, C], so there are few tiles: the token loop is
split over programs, each writes an fp32 partial, and an ordered second pass adds them. No atomics: two runs
with one seed are bitwise equal. The same read can also give the column sums of x (dbias, when x is dY).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import keep_mask
from .reduce import reduce_partials


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def grad_a_kernel(
    p_x: tl.tensor,
    p_l: tl.tensor,
    p_out: tl.tensor,
    p_sum: tl.tensor,
    p_seed: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    R: tl.tensor,
    stride_xm: tl.tensor,
    stride_xc: tl.tensor,
    stride_lm: tl.tensor,
    stride_lr: tl.tensor,
    stride_oc: tl.tensor,
    stride_or: tl.tensor,
    tiles_per_split: tl.tensor,
    scale: tl.tensor,
    dropout_p: tl.tensor,
    HAS_DROPOUT: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of C and of R, split of M) writes `out[split, ...]` and, if asked, `sum[split, c]`.

    The accumulator is [BLOCK_N, BLOCK_R], columns first: a tensor core wants at least 64 rows on the M side
    of its product and is content with 16 on the other, and r is the small one.
    """
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    n_r = tl.cdiv(R, BLOCK_R)
    i_c = i_tile // n_r
    i_r = i_tile % n_r

    o_c = (i_c * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_c = o_c < C
    m_r = o_r < R

    b_acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(M, BLOCK_M))
    for i_m in range(first, last):
        o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < M
        b_x = tl.load(
            p_x + o_m[:, None] * stride_xm + o_c[None, :] * stride_xc,
            mask=m_m[:, None] & m_c[None, :],
            other=0.0,
        )
        b_l = tl.load(
            p_l + o_m[:, None] * stride_lm + o_r[None, :] * stride_lr,
            mask=m_m[:, None] & m_r[None, :],
            other=0.0,
        )
        if HAS_SUM:
            b_sum += tl.sum(b_x.to(tl.float32), axis=0)
        if HAS_DROPOUT:
            b_x = tl.where(keep_mask(p_seed, dropout_p, o_m, i_c * BLOCK_N, C, BLOCK_N), b_x, 0.0)
        b_acc = tl.dot(tl.trans(b_x), b_l, b_acc, input_precision="ieee")

    b_acc *= scale
    i_out = i_split.to(tl.int64) * C
    p_tile = p_out + i_out * R + o_c[:, None] * stride_oc + o_r[None, :] * stride_or
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=m_c[:, None] & m_r[None, :])
    if HAS_SUM and i_r == 0:
        tl.store(p_sum + i_out + o_c, b_sum.to(p_sum.dtype.element_ty), mask=m_c)


def grad_a(
    x: Tensor,
    l: Tensor,  # noqa: E741 - the left factor, as in the formula
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    *,
    dtype: torch.dtype,
    columns_first: bool = False,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`out [r, C] = scale * l[M, r]^T drop(x [M, C])` in `dtype`; transposed to [C, r] with `columns_first`.

    Returns `(out, colsum(x) [C] in sum_dtype, or None when sum_dtype is None)`. The column sum is of x
    itself, without dropout. `scale` as in `down_projection`. `l` has x's dtype; any strides.
    """
    m, c = x.shape
    r = l.shape[1]
    config = configs.select(configs.GRAD_A, x, r)
    block_r = config.r_tile(r)
    programs = launch.cdiv(c, config.block_n) * launch.cdiv(r, block_r)
    units = launch.unit_count(x.device)
    splits, per_split = launch.split_reduction(programs, launch.cdiv(m, config.block_m), units)
    shape = (c, r) if columns_first else (r, c)
    stride_oc, stride_or = (r, 1) if columns_first else (1, c)
    has_sum = sum_dtype is not None
    if splits == 1:
        out = launch.empty(shape, dtype, x)
        total = launch.empty((c,), sum_dtype, x) if sum_dtype is not None else None
    else:
        out = launch.empty((splits, *shape), launch.PARTIAL_DTYPE, x)
        total = launch.empty((splits, c), launch.PARTIAL_DTYPE, x) if has_sum else None
    grad_a_kernel[(programs, splits)](
        x,
        l,
        out,
        total,
        seed,
        m,
        c,
        r,
        x.stride(0),
        x.stride(1),
        l.stride(0),
        l.stride(1),
        stride_oc,
        stride_or,
        per_split,
        scale,
        dropout_p,
        HAS_DROPOUT=dropout_p > 0.0,
        HAS_SUM=has_sum,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    if splits == 1:
        return out, total
    summed = reduce_partials(total, sum_dtype) if total is not None and sum_dtype is not None else None
    return reduce_partials(out, dtype), summed
