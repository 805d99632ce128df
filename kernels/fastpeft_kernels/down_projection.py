"""`out = scale * drop(x) a^T`: the forward's `S = drop(x) A^T`, and `dS = s (c * dY) B` for large ranks.

One read of the wide matrix; the narrow one (r rows) stays in cache. Few rows leave most of a GPU idle, so the
K loop is then split over programs, and the last one of a tile adds their fp32 partials. The rank is a
compile-time constant, as in `grad_s_b`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import draw_mask, interleave, pack_mask
from .finish import is_last, sum_partials


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def down_projection_kernel(
    p_x: tl.tensor,
    p_a: tl.tensor,
    p_out: tl.tensor,
    p_partial: tl.tensor,
    p_counter: tl.tensor,
    p_seed: tl.tensor,
    p_packed: tl.tensor,
    p_c: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    R: tl.constexpr,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    stride_packed: tl.tensor,
    tiles_per_split: tl.tensor,
    scale: tl.tensor,
    dropout_p: tl.tensor,
    HAS_DROPOUT: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    PACK_MASK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of M and of R, split of K); out [M, R] and partial [splits, M, R], contiguous."""
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    n_r = tl.cdiv(R, BLOCK_R)
    # The r tiles of one block of rows run side by side: x comes from memory once and from L2 after that.
    i_m = (i_tile // n_r).to(tl.int64)
    i_r = i_tile % n_r

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_m = o_m < M
    m_r = o_r < R

    b_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
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
        b_a = tl.load(
            p_a + o_k[:, None] * stride_ak + o_r[None, :] * stride_ar,
            mask=m_k[:, None] & m_r[None, :],
            other=0.0,
        )
        if HAS_ROW_SCALE:
            b_a = b_a.to(tl.float32) * tl.load(p_c + o_k, mask=m_k, other=0.0)[:, None]
        if HAS_DROPOUT:
            b_0, b_1, b_2, b_3 = draw_mask(p_seed, dropout_p, o_m, i_k * BLOCK_K, K, BLOCK_K)
            if PACK_MASK:
                # Whole tiles of it exist (`dropout.packed_like`): no mask. Rank tiles write the same bytes.
                o_group = (i_k * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)).to(tl.int64)
                p_tile = p_packed + o_m[:, None] * stride_packed + o_group[None, :]
                tl.store(p_tile, pack_mask(b_0, b_1, b_2, b_3))
            b_x = tl.where(interleave(b_0, b_1, b_2, b_3), b_x, 0.0)
        b_acc = tl.dot(b_x, b_a.to(b_x.dtype), b_acc, input_precision="ieee")

    # `scale` holds 1/(1-p) too: applied to the fp32 sum, the kept elements are never rounded.
    b_acc *= scale
    o_tile = o_m[:, None] * R + o_r[None, :]
    m_tile = m_m[:, None] & m_r[None, :]
    if IS_SPLIT:
        stride_partial = M.to(tl.int64) * R
        tl.store(p_partial + i_split * stride_partial + o_tile, b_acc, mask=m_tile)
        if is_last(p_counter + i_tile, tl.num_programs(1)):
            b_acc = sum_partials(p_partial + o_tile, m_tile, tl.num_programs(1), stride_partial)
            tl.store(p_out + o_tile, b_acc.to(p_out.dtype.element_ty), mask=m_tile)
    else:
        tl.store(p_out + o_tile, b_acc.to(p_out.dtype.element_ty), mask=m_tile)


def down_projection(
    x: Tensor,
    a: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    c: Tensor | None = None,
    packed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`out [M, r] = scale * drop(x [M, K]) (a[r, K] * c[K])^T`, accumulated in fp32.

    Args:
        x: [M, K], any strides.
        a: [r, K], x's dtype or fp32, any strides; converted to x's dtype in registers, after c.
        scale: applied as given: with dropout, the caller folds `1 / (1 - dropout_p)` into it.
        dropout_p: probability of dropping an element of x.
        seed: one int64, with dropout.
        c: [K] fp32 contiguous; 1 when None.
        packed: from `dropout.packed_like`, receives the mask; only with dropout.
        dtype: of out; x's when None.
    """
    m, k = x.shape
    r = a.shape[0]
    config = configs.select(configs.DOWN_PROJECTION, x, r)
    block_r = config.r_tile(r)
    programs = launch.cdiv(m, config.block_m) * launch.cdiv(r, block_r)
    units = launch.unit_count(x.device)
    splits, per_split = launch.split_reduction(programs, launch.cdiv(k, config.block_k), units)
    out = launch.empty((m, r), dtype or x.dtype, x)
    partial = launch.empty((splits, m, r), launch.PARTIAL_DTYPE, x) if splits > 1 else None
    down_projection_kernel[(programs, splits)](
        x,
        a,
        out,
        partial,
        launch.counters(programs, x) if splits > 1 else None,
        seed,
        packed,
        c,
        m,
        k,
        r,
        x.stride(0),
        x.stride(1),
        a.stride(0),
        a.stride(1),
        packed.stride(0) if packed is not None else 0,
        per_split,
        scale,
        dropout_p,
        HAS_DROPOUT=dropout_p > 0.0,
        HAS_ROW_SCALE=c is not None,
        PACK_MASK=packed is not None,
        IS_SPLIT=splits > 1,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
        **configs.all_registers(x.device),
    )
    return out
