"""`out = scale * l^T drop(x)`, a sum over tokens: `dA = dS^T drop(x)`, and `dB^T = s S^T (c * dY)` alone.

The sum runs over all M tokens while the result is only [r, C], so there are few tiles: the token loop is
split over programs, each writes an fp32 partial, and the last one of a tile adds them. No atomics on floats:
two runs with one seed are bitwise equal. Where x is dY, the same read also gives dbias and DoRA's dm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import keep_mask
from .finish import is_last, sum_partials
from .primitives import KeptProduct, RowScale, load_row_scale, magnitude_gradient


@triton.jit  # type: ignore[untyped-decorator]
def store_columns(
    b_acc: tl.tensor,
    b_sum: tl.tensor,
    b_dm: tl.tensor,
    p_out: tl.tensor,
    p_sum: tl.tensor,
    p_dm: tl.tensor,
    p_partial: tl.tensor,
    p_counter: tl.tensor,
    i_counter: tl.tensor,
    o_tile: tl.tensor,
    m_tile: tl.tensor,
    o_c: tl.tensor,
    m_c: tl.tensor,
    C: tl.tensor,
    R: tl.tensor,
    HAS_SUM: tl.constexpr,
    HAS_DM: tl.constexpr,
    IS_SPLIT: tl.constexpr,
) -> None:
    """Write what one program summed over its tokens; the last program of a tile adds the partials.

    A tile [columns, ranks] at offsets o_tile, and of each column, under the mask m_c, the sum and dm. The
    partial of a split holds C * R elements of out, C sums if any, C of dm if any.
    """
    if IS_SPLIT:
        n_out = tl.cast(C, tl.int64) * R
        o_dm = n_out + C if HAS_SUM else n_out
        stride_partial = o_dm + C if HAS_DM else o_dm
        p_split = p_partial + tl.program_id(1) * stride_partial
        tl.store(p_split + o_tile, b_acc, mask=m_tile)
        if HAS_SUM:
            tl.store(p_split + n_out + o_c, b_sum, mask=m_c)
        if HAS_DM:
            tl.store(p_split + o_dm + o_c, b_dm, mask=m_c)
        n_splits = tl.num_programs(1)
        if is_last(p_counter + i_counter, n_splits):
            b_acc = sum_partials(p_partial + o_tile, m_tile, n_splits, stride_partial)
            tl.store(p_out + o_tile, b_acc.to(p_out.dtype.element_ty), mask=m_tile)
            if HAS_SUM:
                b_sum = sum_partials(p_partial + n_out + o_c, m_c, n_splits, stride_partial)
                tl.store(p_sum + o_c, b_sum.to(p_sum.dtype.element_ty), mask=m_c)
            if HAS_DM:
                b_dm = sum_partials(p_partial + o_dm + o_c, m_c, n_splits, stride_partial)
                tl.store(p_dm + o_c, b_dm.to(p_dm.dtype.element_ty), mask=m_c)
    else:
        tl.store(p_out + o_tile, b_acc.to(p_out.dtype.element_ty), mask=m_tile)
        if HAS_SUM:
            tl.store(p_sum + o_c, b_sum.to(p_sum.dtype.element_ty), mask=m_c)
        if HAS_DM:
            tl.store(p_dm + o_c, b_dm.to(p_dm.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def grad_a_kernel(
    p_x: tl.tensor,
    p_l: tl.tensor,
    p_out: tl.tensor,
    p_sum: tl.tensor,
    p_dm: tl.tensor,
    p_partial: tl.tensor,
    p_counter: tl.tensor,
    p_seed: tl.tensor,
    p_kept: tl.tensor,
    p_magnitude: tl.tensor,
    p_norm: tl.tensor,
    p_c: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    R: tl.tensor,
    stride_xm: tl.tensor,
    stride_xc: tl.tensor,
    stride_lm: tl.tensor,
    stride_lr: tl.tensor,
    stride_oc: tl.tensor,
    stride_or: tl.tensor,
    stride_magnitude: tl.tensor,
    tiles_per_split: tl.tensor,
    scale: tl.tensor,
    dropout_p: tl.tensor,
    HAS_DROPOUT: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_DM: tl.constexpr,
    KEPT_IS_Z: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of C and of R, split of M).

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
    b_dm = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(M, BLOCK_M))
    for i_m in range(first, last):
        o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < M
        m_mc = m_m[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_xm + o_c[None, :] * stride_xc, mask=m_mc, other=0.0)
        b_l = tl.load(
            p_l + o_m[:, None] * stride_lm + o_r[None, :] * stride_lr,
            mask=m_m[:, None] & m_r[None, :],
            other=0.0,
        )
        if HAS_SUM:
            b_sum += tl.sum(b_x.to(tl.float32), axis=0)
        if HAS_DM:
            # Rank tiles beside the first would read `kept` for nothing.
            o_kept = o_m[:, None] * C + o_c[None, :]
            b_kept = tl.load(p_kept + o_kept, mask=m_mc & (i_r == 0), other=0.0)
            b_dm += tl.sum(b_x.to(tl.float32) * b_kept.to(tl.float32), axis=0)
        if HAS_DROPOUT:
            b_x = tl.where(keep_mask(p_seed, dropout_p, o_m, i_c * BLOCK_N, C, BLOCK_N), b_x, 0.0)
        b_acc = tl.dot(tl.trans(b_x), b_l, b_acc, input_precision="ieee")

    b_acc *= scale
    if HAS_ROW_SCALE:
        b_c, b_norm = load_row_scale(p_magnitude, p_norm, stride_magnitude, o_c, m_c)
        b_acc *= b_c[:, None]
        tl.store(p_c + o_c, b_c, mask=m_c & (i_r == 0) & (i_split == 0))
        if HAS_DM:
            b_dm = magnitude_gradient(b_dm, b_c, b_norm, KEPT_IS_Z)
    store_columns(
        b_acc,
        b_sum,
        b_dm,
        p_out,
        p_sum,
        p_dm,
        p_partial,
        p_counter,
        i_tile,
        o_c[:, None] * stride_oc + o_r[None, :] * stride_or,
        m_c[:, None] & m_r[None, :],
        o_c,
        m_c & (i_r == 0),
        C,
        R,
        HAS_SUM,
        HAS_DM,
        IS_SPLIT,
    )


def grad_a(
    x: Tensor,
    l: Tensor,  # noqa: E741 - the left factor, as in the formula
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    dtype: torch.dtype,
    columns_first: bool = False,
    sum_dtype: torch.dtype | None = None,
    row_scale: RowScale | None = None,
    kept: KeptProduct | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`out [r, C] = scale * l[M, r]^T (c[C] * drop(x [M, C]))`, and sums over the tokens of x.

    Args:
        x: [M, C], any strides.
        l: [M, r] in x's dtype, any strides.
        scale: as in `down_projection`, like dropout_p and seed.
        dropout_p: probability of dropping an element of x in out; the sums are of x itself.
        seed: one int64, with dropout.
        dtype: of out.
        columns_first: whether out is [C, r].
        sum_dtype: of `colsum(x)`, which is left out when None.
        row_scale: c, one for each column of x; 1 when None.
        kept: y or z of DoRA, [M, C], when dm is wanted; with row_scale only.

    Returns: `(out, colsum(x) [C] or None, dm [C] in the magnitude's dtype or None)`.
    """
    m, c = x.shape
    r = l.shape[1]
    config = configs.select(configs.GRAD_A, x, r)
    block_r = config.r_tile(r)
    programs = launch.cdiv(c, config.block_n) * launch.cdiv(r, block_r)
    units = launch.unit_count(x.device)
    splits, per_split = launch.split_reduction(programs, launch.cdiv(m, config.block_m), units)
    stride_oc, stride_or = (r, 1) if columns_first else (1, c)
    out = launch.empty((c, r) if columns_first else (r, c), dtype, x)
    total = launch.empty((c,), sum_dtype, x) if sum_dtype is not None else None
    dm = None
    if kept is not None and row_scale is not None:
        dm = launch.empty((c,), row_scale.magnitude.dtype, x)
    partial = None
    if splits > 1:
        size = c * (r + (total is not None) + (dm is not None))
        partial = launch.empty((splits, size), launch.PARTIAL_DTYPE, x)
    grad_a_kernel[(programs, splits)](
        x,
        l,
        out,
        total,
        dm,
        partial,
        launch.counters(programs, x) if splits > 1 else None,
        seed,
        kept.values if kept is not None else None,
        row_scale.magnitude if row_scale is not None else None,
        row_scale.norm if row_scale is not None else None,
        row_scale.c if row_scale is not None else None,
        m,
        c,
        r,
        x.stride(0),
        x.stride(1),
        l.stride(0),
        l.stride(1),
        stride_oc,
        stride_or,
        row_scale.magnitude.stride(0) if row_scale is not None else 0,
        per_split,
        scale,
        dropout_p,
        HAS_DROPOUT=dropout_p > 0.0,
        HAS_SUM=total is not None,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_DM=dm is not None,
        KEPT_IS_Z=kept is not None and kept.is_z,
        IS_SPLIT=splits > 1,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
        **configs.all_registers(x.device),
    )
    return out, total, dm
