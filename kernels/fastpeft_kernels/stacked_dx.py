"""`dx = sum_i (c_i * dY_i) W_i + mask_i * (dS_i A_i) / (1 - p)` for one to three projections of one x.

One GEMM whose reduction runs over the columns of each dY in turn: dx is accumulated in registers and written
once, where a GEMM a projection would read and write it again. DoRA's row scale is applied to dY's tile in
registers, so `c * dY` is never written. The rank-r products come after the loops, as in `rank_r_gemm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .gemm_parts import add_input_gradient, base_product, part_columns, rank_tile, select_tile, split_columns
from .kernel_names import STACKED_DX, STACKED_DX_DROPOUT
from .primitives import grouped_tile
from .projection import Projection

# Columns that the epilogue goes through at a time under dropout, where each rank-r product needs a block of
# its own beside the accumulator: one for all columns spills at 128x128 already, with three projections.
PART_COLUMNS = 32


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def stacked_dx_kernel(
    p_dy: tl.tensor,
    p_w: tl.tensor,
    p_ds: tl.tensor,
    p_a: tl.tensor,
    p_c: tl.tensor,
    p_packed: tl.tensor,
    p_dx: tl.tensor,
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
    keep_scale: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """One program, one tile of dx [M, K] (contiguous), BLOCK_N of its columns; BLOCK_K steps through N_i."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_k = o_k < K

    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in tl.static_range(COUNT):
        b_acc = base_product(
            b_acc,
            p_dy[i],
            p_w[i],
            p_c[i],
            o_m,
            m_m,
            o_k,
            m_k,
            N[i],
            stride_dm[i],
            stride_dn[i],
            stride_wn[i],
            stride_wk[i],
            BLOCK_K,
        )
    b_parts = split_columns(b_acc, PARTS)
    for i_part in tl.static_range(PARTS):
        b_dx = b_parts[i_part]
        o_part = part_columns(i_n, i_part, BLOCK_N, PARTS)
        for i in tl.static_range(COUNT):
            if p_a[i] is not None:
                b_dx = add_input_gradient(
                    b_dx,
                    p_ds[i],
                    p_a[i],
                    p_packed[i],
                    o_m,
                    m_m,
                    o_part,
                    i_n * BLOCK_N + i_part * (BLOCK_N // PARTS),
                    K,
                    R[i],
                    stride_sm[i],
                    stride_ar[i],
                    stride_ak[i],
                    keep_scale,
                    BLOCK_R,
                )
        p_tile = p_dx + o_m[:, None] * K + o_part[None, :]
        tl.store(p_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_m[:, None] & (o_part < K)[None, :])


def stacked_dx(
    dys: Sequence[Tensor],
    projections: Sequence[Projection],
    dSs: Sequence[Tensor | None],
    cs: Sequence[Tensor | None],
    packed: Sequence[Tensor | None],
    keep_scale: float,
) -> Tensor:
    """dx [M, K] in the dtype of the dY_i [M, N_i]; dS_i [M, r_i] contiguous, None without an adapter.

    c_i [N_i] fp32 contiguous, None in LoRA; packed_i [M, ceil(K / 4)] (`dropout.pack_mask`), None without
    dropout, whose 1 / (1 - p) is `keep_scale`. Any strides of dY, W and A.
    """
    m, k = dys[0].shape[0], projections[0].weight.shape[1]
    has_dropout = any(mask is not None for mask in packed)
    key = STACKED_DX_DROPOUT if has_dropout else STACKED_DX
    config = select_tile(key, m, (k,), *dys, *(p.weight for p in projections))
    dx = launch.empty((m, k), dys[0].dtype, dys[0])
    stacked_dx_kernel[(launch.cdiv(m, config.block_m) * launch.cdiv(k, config.block_n),)](
        p_dy=tuple(dys),
        p_ds=tuple(dSs),
        p_c=tuple(cs),
        p_packed=tuple(packed),
        p_dx=dx,
        M=m,
        K=k,
        stride_dm=tuple(dy.stride(0) for dy in dys),
        stride_dn=tuple(dy.stride(1) for dy in dys),
        stride_sm=tuple(0 if dS is None else dS.stride(0) for dS in dSs),
        **input_gradient_arguments(projections),
        keep_scale=keep_scale,
        COUNT=len(projections),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=rank_tile(config, projections),
        GROUP_M=config.group_m,
        PARTS=max(1, config.block_n // PART_COLUMNS) if has_dropout else 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return dx


def input_gradient_arguments(projections: Sequence[Projection]) -> dict[str, tuple[object, ...]]:
    """What the input gradient reads of each projection, as tuples under the kernels' argument names."""
    adapters = [p.lora_A for p in projections]
    return {
        "p_w": tuple(p.weight for p in projections),
        "p_a": tuple(adapters),
        "N": tuple(p.weight.shape[0] for p in projections),
        "R": tuple(0 if a is None else a.shape[0] for a in adapters),
        "stride_wn": tuple(p.weight.stride(0) for p in projections),
        "stride_wk": tuple(p.weight.stride(1) for p in projections),
        "stride_ar": tuple(0 if a is None else a.stride(0) for a in adapters),
        "stride_ak": tuple(0 if a is None else a.stride(1) for a in adapters),
    }
