"""`S_i = drop_i(x) A_i^T` for one to three projections of one x: one read of x, one S [M, sum r].

A program loads a tile of x once and multiplies it by the A of every projection, each under its own mask. As
in `down_projection`, few rows leave most of a GPU idle: the K loop is then split over programs, and the last
one of a tile adds their fp32 partials in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import keep_mask
from .finish import is_last, sum_partials
from .kernel_names import STACKED_DOWN


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def stacked_down_kernel(
    p_x: tl.tensor,
    p_a: tl.tensor,
    p_s: tl.tensor,
    p_partial: tl.tensor,
    p_counter: tl.tensor,
    p_seed: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_sm: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    offset_s: tl.tensor,
    tiles_per_split: tl.tensor,
    keep_scale: tl.tensor,
    dropout_p: tl.tensor,
    COUNT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of M, tile of every R, split of K); partial is [splits, M, sum r], None for one split."""
    i_m = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1)
    i_split = tl.program_id(2)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_m = o_m < M

    b_accs = (tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32),) * COUNT
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, BLOCK_K))
    for i_k in range(first, last):
        o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < K
        b_x = tl.load(
            p_x + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk,
            mask=m_m[:, None] & m_k[None, :],
            other=0.0,
        )
        b_sums = ()
        for i in tl.static_range(COUNT):
            b_a = tl.load(
                p_a[i] + o_k[:, None] * stride_ak[i] + o_r[None, :] * stride_ar[i],
                mask=m_k[:, None] & (o_r < R[i])[None, :],
                other=0.0,
            )
            b_dropped = b_x
            if HAS_DROPOUT:
                b_keep = keep_mask(p_seed[i], dropout_p, o_m, i_k * BLOCK_K, K, BLOCK_K)
                b_dropped = tl.where(b_keep, b_x, 0.0)
            b_sum = tl.dot(b_dropped, b_a.to(b_x.dtype), b_accs[i], input_precision="ieee")
            b_sums = b_sums + (b_sum,)  # type: ignore[assignment]  # noqa: RUF005
        b_accs = b_sums

    p_rows = p_s + o_m[:, None] * stride_sm + o_r[None, :]
    if p_partial is None:
        for i in tl.static_range(COUNT):
            b_s = (b_accs[i] * keep_scale).to(p_s.dtype.element_ty)
            tl.store(p_rows + offset_s[i], b_s, mask=m_m[:, None] & (o_r < R[i])[None, :])
    else:
        p_parts = p_partial + o_m[:, None] * stride_sm + o_r[None, :]
        stride_partial = tl.cast(M, tl.int64) * stride_sm
        for i in tl.static_range(COUNT):
            m_s = m_m[:, None] & (o_r < R[i])[None, :]
            tl.store(p_parts + offset_s[i] + i_split * stride_partial, b_accs[i], mask=m_s)
        if is_last(p_counter + i_m * tl.num_programs(1) + i_r, tl.num_programs(2)):
            for i in tl.static_range(COUNT):
                m_s = m_m[:, None] & (o_r < R[i])[None, :]
                b_s = (
                    sum_partials(p_parts + offset_s[i], m_s, tl.num_programs(2), stride_partial) * keep_scale
                )
                tl.store(p_rows + offset_s[i], b_s.to(p_s.dtype.element_ty), mask=m_s)


def stacked_down(
    x: Tensor, adapters: Sequence[Tensor], dropout_p: float, seeds: Sequence[Tensor | None]
) -> Tensor:
    """`S [M, sum r]` in x's dtype, columns of the adapters A_i [r_i, K] side by side, accumulated in fp32.

    An A may be fp32 under a 16-bit x; it is converted in registers. Any strides. `seeds[i]` holds the int64
    of mask i and is read only with dropout, whose `1 / (1 - p)` is applied to the fp32 sum.
    """
    m, k = x.shape
    ranks = tuple(a.shape[0] for a in adapters)
    config = configs.select(STACKED_DOWN, x, max(ranks))
    block_r = config.r_tile(max(ranks))
    tiles_m, tiles_r = launch.cdiv(m, config.block_m), launch.cdiv(max(ranks), block_r)
    splits, per_split = launch.split_reduction(
        tiles_m * tiles_r, launch.cdiv(k, config.block_k), launch.unit_count(x.device)
    )
    S = launch.empty((m, sum(ranks)), x.dtype, x)
    is_split = splits > 1
    stacked_down_kernel[(tiles_m, tiles_r, splits)](
        p_x=x,
        p_a=tuple(adapters),
        p_s=S,
        p_partial=launch.empty((splits, *S.shape), launch.PARTIAL_DTYPE, x) if is_split else None,
        p_counter=launch.counters(tiles_m * tiles_r, x) if is_split else None,
        p_seed=tuple(seeds) if dropout_p > 0.0 else None,
        M=m,
        K=k,
        R=ranks,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=S.stride(0),
        stride_ar=tuple(a.stride(0) for a in adapters),
        stride_ak=tuple(a.stride(1) for a in adapters),
        offset_s=tuple(accumulate(ranks[:-1], initial=0)),
        tiles_per_split=per_split,
        keep_scale=1.0 / (1.0 - dropout_p),
        dropout_p=dropout_p,
        COUNT=len(adapters),
        HAS_DROPOUT=dropout_p > 0.0,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return S
