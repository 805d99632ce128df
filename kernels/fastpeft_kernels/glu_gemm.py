"""`h = act(g) * u` with `g` and `u` two projections of one x: one read of x, two accumulators, one epilogue.

    g = c_g * (x W_g^T + s_g S_g B_g^T) + bias_g        u likewise        S = [drop(x) A_g^T, drop(x) A_u^T]

g and u are stored for backward, in the same pass in which they are still in registers as fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .activation import activate
from .gemm_parts import (
    add_low_rank,
    finish_product,
    part_columns,
    product_arguments,
    rank_tile,
    select_tile,
    split_columns,
)
from .kernel_names import GLU_GEMM
from .primitives import grouped_tile
from .projection import Projection

# Columns that the epilogue goes through at a time: both tiles of 128x128 at once spill 540 bytes on sm_90, 32
# columns at a time leave 27 registers free (DoRA, bias, z kept, r = 64).
PART_COLUMNS = 32


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def glu_gemm_kernel(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_s: tl.tensor,
    p_b: tl.tensor,
    p_bias: tl.tensor,
    p_magnitude: tl.tensor,
    p_norm: tl.tensor,
    p_h: tl.tensor,
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
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """One program, one tile of h, g, u [M, N] (contiguous); tuples are (gate, up), p_y = (p_g, p_u)."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N[0], BLOCK_N), GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N[0]

    b_accs = (tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),) * 2
    for i_k in range(tl.cdiv(K, BLOCK_K)):
        o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < K
        b_x = tl.load(
            p_x + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk,
            mask=m_m[:, None] & m_k[None, :],
            other=0.0,
        )
        b_sums = ()
        for i in tl.static_range(2):
            b_w = tl.load(
                p_w[i] + o_k[:, None] * stride_wk[i] + o_n[None, :] * stride_wn[i],
                mask=m_k[:, None] & m_n[None, :],
                other=0.0,
            )
            b_sum = tl.dot(b_x, b_w, b_accs[i], input_precision="ieee")
            b_sums = b_sums + (b_sum,)  # type: ignore[assignment]  # noqa: RUF005
        b_accs = b_sums  # type: ignore[assignment]

    b_parts = ()
    for i in tl.static_range(2):
        b_z = add_low_rank(
            b_accs[i],
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
        b_parts = b_parts + (split_columns(b_z, PARTS),)  # type: ignore[assignment]  # noqa: RUF005
    for i_part in tl.static_range(PARTS):
        o_part = part_columns(i_n, i_part, BLOCK_N, PARTS)
        m_part = o_part < N[0]
        b_ys = ()
        for i in tl.static_range(2):
            b_y = finish_product(
                b_parts[i][i_part],
                p_bias[i],
                p_magnitude[i],
                p_norm[i],
                p_y[i],
                p_z[i],
                o_m,
                m_m,
                o_part,
                m_part,
                N[0],
                stride_bias[i],
                stride_magnitude[i],
            )
            b_ys = b_ys + (b_y,)  # type: ignore[assignment]  # noqa: RUF005
        b_h = activate(b_ys[0], ACTIVATION) * b_ys[1]  # type: ignore[misc]
        p_tile = p_h + o_m[:, None] * N[0] + o_part[None, :]
        tl.store(p_tile, b_h.to(p_h.dtype.element_ty), mask=m_m[:, None] & m_part[None, :])


def glu_gemm(
    x: Tensor,
    gate: Projection,
    up: Projection,
    S: Tensor | None,
    activation: str,
    *,
    keep: bool,
    keep_z: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """`(h, g, u, (z_g, z_u))`, [M, N] in x's dtype; g and u None unless `keep`, z as in `stacked_gemm`."""
    m, k = x.shape
    n = gate.weight.shape[0]
    config = select_tile(GLU_GEMM, m, (n,), x, gate.weight, up.weight)
    h = launch.empty((m, n), x.dtype, x)
    g, u, z_g, z_u = (
        launch.empty((m, n), x.dtype, x) if wanted else None for wanted in (keep, keep, *keep_z)
    )
    glu_gemm_kernel[(launch.cdiv(m, config.block_m) * launch.cdiv(n, config.block_n),)](
        p_x=x,
        p_s=S,
        p_h=h,
        p_y=(g, u),
        p_z=(z_g, z_u),
        M=m,
        K=k,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=0 if S is None else S.stride(0),
        **product_arguments((gate, up)),
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=rank_tile(config, (gate, up)),
        GROUP_M=config.group_m,
        PARTS=max(1, config.block_n // PART_COLUMNS),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return h, g, u, (z_g, z_u)
