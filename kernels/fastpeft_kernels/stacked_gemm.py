"""`y_i = c_i * (x W_i^T + s_i S_i B_i^T) + bias_i` for one to three projections of one x, in one launch.

The column tiles of all outputs form one grid, so that the programs which share a block of x run side by side
and a narrow projection (grouped-query k and v) does not leave units idle. A tile belongs to one projection,
to whose code it branches: each has its own rank, bias, row scale, or no adapter, known at compile time.
Picking pointers and strides by value in front of one K loop for all was tried. It keeps the 16-byte loads and
wgmma, but spills 1,584 bytes at 128x256x64 on sm_90, inside the loop too (286 instructions a step, not 133).
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .gemm_parts import (
    add_low_rank,
    base_product,
    finish_product,
    part_columns,
    product_arguments,
    rank_tile,
    select_tile,
    split_columns,
)
from .kernel_names import STACKED_GEMM
from .primitives import grouped_tile
from .projection import Projection

# Columns that the epilogue goes through at a time: all of 128x256 at once spill 272 bytes on sm_90 where z is
# kept beside a DoRA output with a bias. 64 columns of 16 bits are a cache line.
PART_COLUMNS = 64


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def stacked_gemm_kernel(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_s: tl.tensor,
    p_b: tl.tensor,
    p_bias: tl.tensor,
    p_magnitude: tl.tensor,
    p_norm: tl.tensor,
    p_y: tl.tensor,
    p_z: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    N: tl.tensor,
    R: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_sm: tl.tensor,
    offset_s: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    stride_bias: tl.tensor,
    stride_magnitude: tl.tensor,
    scale: tl.tensor,
    inverse_scale: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """One program, one tile of one y_i [M, N_i] (contiguous); tuples of COUNT; S [M, sum r], unit columns."""
    n_n = 0
    for i in tl.static_range(COUNT):
        n_n += tl.cdiv(N[i], BLOCK_N)
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), n_n, GROUP_M)
    # From the tile of all columns to the projection and the tile of its own columns.
    i_projection = 0
    first = 0
    end = 0
    for i in tl.static_range(COUNT - 1):
        end += tl.cdiv(N[i], BLOCK_N)
        i_projection = tl.where(i_n >= end, i + 1, i_projection)
        first = tl.where(i_n >= end, end, first)

    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (i_n - first).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    for i in tl.static_range(COUNT):
        if i_projection == i:
            m_n = o_n < N[i]
            b_y = base_product(
                tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
                p_x,
                p_w[i],
                None,
                o_m,
                m_m,
                o_n,
                m_n,
                K,
                stride_xm,
                stride_xk,
                stride_wk[i],
                stride_wn[i],
                BLOCK_K,
            )
            b_y = add_low_rank(
                b_y,
                p_s,
                p_b[i],
                o_m,
                m_m,
                o_n,
                m_n,
                R[i],
                offset_s[i],
                stride_sm,
                stride_bn[i],
                stride_br[i],
                scale[i],
                inverse_scale[i],
                BLOCK_R,
            )
            b_parts = split_columns(b_y, PARTS)
            for i_part in tl.static_range(PARTS):
                o_part = part_columns(i_n - first, i_part, BLOCK_N, PARTS)
                finish_product(
                    b_parts[i_part],
                    p_bias[i],
                    p_magnitude[i],
                    p_norm[i],
                    p_y[i],
                    p_z[i],
                    o_m,
                    m_m,
                    o_part,
                    o_part < N[i],
                    N[i],
                    stride_bias[i],
                    stride_magnitude[i],
                )
            # With the program ending here, the next projection's code does not follow on this one's, and none
            # of its addresses are held meanwhile: 40 registers less at 128x256x64 on sm_90.
            return


def stacked_gemm(
    x: Tensor, projections: Sequence[Projection], S: Tensor | None, keep_z: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """`(ys, zs)`: y_i [M, N_i] and, where asked for, z_i = x W_i^T + s_i S_i B_i^T, in x's dtype.

    S [M, sum r], contiguous, None when no projection has an adapter.
    """
    m, k = x.shape
    widths = tuple(p.weight.shape[0] for p in projections)
    config = select_tile(STACKED_GEMM, m, widths, x, *(p.weight for p in projections))
    ys = [launch.empty((m, n), x.dtype, x) for n in widths]
    zs = [launch.empty((m, n), x.dtype, x) if keep else None for n, keep in zip(widths, keep_z, strict=True)]
    tiles_n = sum(launch.cdiv(n, config.block_n) for n in widths)
    stacked_gemm_kernel[(launch.cdiv(m, config.block_m) * tiles_n,)](
        p_x=x,
        p_s=S,
        p_y=tuple(ys),
        p_z=tuple(zs),
        M=m,
        K=k,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=0 if S is None else S.stride(0),
        **product_arguments(projections),
        COUNT=len(projections),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=rank_tile(config, projections),
        GROUP_M=config.group_m,
        PARTS=max(1, config.block_n // PART_COLUMNS),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return ys, zs
