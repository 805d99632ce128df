"""A gate's input gradients, `dg = dh * u * act'(g)` and `du = dh * act(g)`, with dh in registers only.

    dh = (c * dY) W_down + mask * (dS A_down) / (1 - p)

is the input gradient of the down projection, [M, N] and as wide as the block gets. Its tile is used up where
it is made: the epilogue reads the tiles of g and u and writes dg and du.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .activation import activate_and_derive
from .gemm_parts import add_input_gradient, base_product, part_columns, rank_tile, select_tile, split_columns
from .kernel_names import GLU_BACKWARD, GLU_BACKWARD_DROPOUT
from .primitives import grouped_tile
from .projection import Projection
from .stacked_dx import input_gradient_arguments

# Columns that the epilogue goes through at a time: all of 128x128 at once spills on sm_90, 32 at a time fit
# beside an accumulator of 128x256, dropout included.
PART_COLUMNS = 32


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def glu_backward_kernel(
    p_dy: tl.tensor,
    p_w: tl.tensor,
    p_ds: tl.tensor,
    p_a: tl.tensor,
    p_c: tl.tensor,
    p_packed: tl.tensor,
    p_g: tl.tensor,
    p_u: tl.tensor,
    p_dg: tl.tensor,
    p_du: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    N: tl.tensor,
    R: tl.tensor,
    stride_dm: tl.tensor,
    stride_dn: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_sm: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    stride_gm: tl.tensor,
    stride_gk: tl.tensor,
    stride_um: tl.tensor,
    stride_uk: tl.tensor,
    keep_scale: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """One program, one tile of dg and du [M, K] (contiguous); W_down [N, K], dY [M, N]; tuples of one."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_k = o_k < K
    b_dh = base_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        p_dy,
        p_w[0],
        p_c,
        o_m,
        m_m,
        o_k,
        m_k,
        N[0],
        stride_dm,
        stride_dn,
        stride_wn[0],
        stride_wk[0],
        BLOCK_K,
    )
    b_parts = split_columns(b_dh, PARTS)
    for i_part in tl.static_range(PARTS):
        b_dh = b_parts[i_part]
        o_part = part_columns(i_n, i_part, BLOCK_N, PARTS)
        if p_a[0] is not None:
            b_dh = add_input_gradient(
                b_dh,
                p_ds,
                p_a[0],
                p_packed,
                o_m,
                m_m,
                o_part,
                i_n * BLOCK_N + i_part * (BLOCK_N // PARTS),
                K,
                R[0],
                stride_sm,
                stride_ar[0],
                stride_ak[0],
                keep_scale,
                BLOCK_R,
            )
        m_tile = m_m[:, None] & (o_part < K)[None, :]
        o_tile = o_m[:, None] * K + o_part[None, :]
        p_tile = p_g + o_m[:, None] * stride_gm + o_part[None, :] * stride_gk
        b_g = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        p_tile = p_u + o_m[:, None] * stride_um + o_part[None, :] * stride_uk
        b_u = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_h, b_slope = activate_and_derive(b_g, ACTIVATION)
        tl.store(p_du + o_tile, (b_dh * b_h).to(p_du.dtype.element_ty), mask=m_tile)
        tl.store(p_dg + o_tile, (b_dh * b_u * b_slope).to(p_dg.dtype.element_ty), mask=m_tile)


def glu_backward_gemm(
    dy: Tensor,
    down: Projection,
    dS: Tensor | None,
    c: Tensor | None,
    g: Tensor,
    u: Tensor,
    activation: str,
    packed: Tensor | None,
    keep_scale: float,
) -> tuple[Tensor, Tensor]:
    """`(dg, du)` [M, K] in the dtype of dy [M, N], for a down projection W [N, K].

    g and u are [M, K], any strides; c, packed and keep_scale as in `stacked_dx`, the mask that of h [M, K].
    """
    m, k = g.shape
    key = GLU_BACKWARD if packed is None else GLU_BACKWARD_DROPOUT
    config = select_tile(key, m, (k,), dy, down.weight, g, u)
    dg, du = launch.empty((m, k), dy.dtype, dy), launch.empty((m, k), dy.dtype, dy)
    glu_backward_kernel[(launch.cdiv(m, config.block_m) * launch.cdiv(k, config.block_n),)](
        p_dy=dy,
        p_ds=dS,
        p_c=c,
        p_packed=packed,
        p_g=g,
        p_u=u,
        p_dg=dg,
        p_du=du,
        M=m,
        K=k,
        stride_dm=dy.stride(0),
        stride_dn=dy.stride(1),
        stride_sm=0 if dS is None else dS.stride(0),
        stride_gm=g.stride(0),
        stride_gk=g.stride(1),
        stride_um=u.stride(0),
        stride_uk=u.stride(1),
        **input_gradient_arguments((down,)),
        keep_scale=keep_scale,
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=rank_tile(config, (down,)),
        GROUP_M=config.group_m,
        PARTS=max(1, config.block_n // PART_COLUMNS),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return dg, du
