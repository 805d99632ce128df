"""`out = scale * drop(x) a^T`: the forward's `S = drop(x) A^T`, and `dS = s dY B` when dB is not wanted too.

One read of the wide matrix; the narrow one (r rows) stays in cache. Few rows leave most of a GPU idle, so the
K loop is then split over programs and their fp32 partials are added by a second, ordered pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import keep_mask
from .reduce import reduce_partials


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def down_projection_kernel(
    p_x: tl.tensor,
    p_a: tl.tensor,
    p_out: tl.tensor,
    p_seed: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    tiles_per_split: tl.tensor,
    scale: tl.tensor,
    dropout_p: tl.tensor,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of M and of R, split of K) writes its part of out, [splits, M, R], contiguous."""
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
        if HAS_DROPOUT:
            b_x = tl.where(keep_mask(p_seed, dropout_p, o_m, i_k * BLOCK_K, K, BLOCK_K), b_x, 0.0)
        b_acc = tl.dot(b_x, b_a.to(b_x.dtype), b_acc, input_precision="ieee")

    # `scale` holds 1/(1-p) too: applied to the fp32 sum, the kept elements are never rounded.
    b_acc *= scale
    p_tile = p_out + i_split.to(tl.int64) * M * R + o_m[:, None] * R + o_r[None, :]
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])


def down_projection(x: Tensor, a: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    """`out [M, r] = scale * drop(x [M, K]) a[r, K]^T` in x's dtype, accumulated in fp32.

    `scale` is applied as given: with dropout, the caller folds `1 / (1 - dropout_p)` into it. `a` may be fp32
    under a 16-bit x; it is converted in registers. Any strides.
    """
    m, k = x.shape
    r = a.shape[0]
    units = launch.unit_count(x.device)
    config = configs.select(configs.DOWN_PROJECTION, x, r)
    block_r = config.r_tile(r)
    programs = launch.cdiv(m, config.block_m) * launch.cdiv(r, block_r)
    splits, per_split = launch.split_reduction(programs, launch.cdiv(k, config.block_k), units)
    out = launch.empty(
        (m, r) if splits == 1 else (splits, m, r), x.dtype if splits == 1 else launch.PARTIAL_DTYPE, x
    )
    down_projection_kernel[(programs, splits)](
        x,
        a,
        out,
        seed,
        m,
        k,
        r,
        x.stride(0),
        x.stride(1),
        a.stride(0),
        a.stride(1),
        per_split,
        scale,
        dropout_p,
        HAS_DROPOUT=dropout_p > 0.0,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return out if splits == 1 else reduce_partials(out, x.dtype)
