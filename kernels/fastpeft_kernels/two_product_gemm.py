"""The GEMMs of DoRA under PEFT's dropout, which applies the row scale's excess to the dropped base product.

    y  = x W^T + (c - 1) * (drop(x) W^T) + c * s S B^T + bias          z = drop(x) W^T + s S B^T
    dx = dY W + mask * (((c - 1) * dY) W + dS A) / (1 - p)

Two base products each, with operands that differ by a mask or by c: made here in one pass, each tile of x (or
dY) and of W read once and multiplied twice, into two accumulators. PEFT makes two GEMMs and several passes
over [M, N] of it.

In terms of z, `y = x W^T - drop(x) W^T + c * z + bias`: the form the forward's epilogue computes, because z
may have to be kept.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import keep_mask, unpack_mask
from .primitives import RowScale, grouped_tile, load_row_scale, low_product


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def two_product_gemm_kernel(
    p_p: tl.tensor,
    p_q: tl.tensor,
    p_l: tl.tensor,
    p_r: tl.tensor,
    p_bias: tl.tensor,
    p_magnitude: tl.tensor,
    p_norm: tl.tensor,
    p_c: tl.tensor,
    p_out: tl.tensor,
    p_z: tl.tensor,
    p_seed: tl.tensor,
    p_packed: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_pm: tl.tensor,
    stride_pk: tl.tensor,
    stride_qk: tl.tensor,
    stride_qn: tl.tensor,
    stride_lm: tl.tensor,
    stride_lr: tl.tensor,
    stride_rr: tl.tensor,
    stride_rn: tl.tensor,
    stride_bias: tl.tensor,
    stride_magnitude: tl.tensor,
    stride_packed: tl.tensor,
    scale: tl.tensor,
    second_scale: tl.tensor,
    dropout_p: tl.tensor,
    IS_FORWARD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One program, one tile of out [M, N]; the second operand is P masked (forward) or (c - 1) * P."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N

    b_first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BLOCK_K)):
        o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < K
        b_p = tl.load(
            p_p + o_m[:, None] * stride_pm + o_k[None, :] * stride_pk,
            mask=m_m[:, None] & m_k[None, :],
            other=0.0,
        )
        b_q = tl.load(
            p_q + o_k[:, None] * stride_qk + o_n[None, :] * stride_qn,
            mask=m_k[:, None] & m_n[None, :],
            other=0.0,
        )
        if IS_FORWARD:
            o_group = (i_k * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)).to(tl.int64)
            b_packed = tl.load(p_packed + o_m[:, None] * stride_packed + o_group[None, :])
            b_other = tl.where(unpack_mask(b_packed), b_p, 0.0)
        else:
            b_c = tl.load(p_c + o_k, mask=m_k, other=0.0)
            b_other = (b_p.to(tl.float32) * (b_c - 1.0)[None, :]).to(b_q.dtype)
        b_first = tl.dot(b_p, b_q, b_first, input_precision="ieee")
        b_second = tl.dot(b_other, b_q, b_second, input_precision="ieee")

    # Forward: the first accumulator becomes x W^T - drop(x) W^T, the second drop(x) W^T / s, and the rank-r
    # product goes on top of it, as in `rank_r_gemm`. Backward: both summands have the scale 1 / (1 - p).
    if IS_FORWARD:
        b_second *= second_scale
        b_first -= b_second * scale
    b_second = low_product(
        b_second, p_l, p_r, o_m, m_m, o_n, m_n, R, stride_lm, stride_lr, stride_rr, stride_rn, BLOCK_R
    )
    b_second *= scale
    o_tile = o_m[:, None] * N + o_n[None, :]
    m_tile = m_m[:, None] & m_n[None, :]
    if IS_FORWARD:
        if KEEP_Z:
            tl.store(p_z + o_tile, b_second.to(p_z.dtype.element_ty), mask=m_tile)
        b_c, _ = load_row_scale(p_magnitude, p_norm, stride_magnitude, o_n, m_n)
        b_first += b_second * b_c[None, :]
        if HAS_BIAS:
            b_first += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    else:
        b_keep = keep_mask(p_seed, dropout_p, o_m, i_n * BLOCK_N, N, BLOCK_N)
        b_first += tl.where(b_keep, b_second, 0.0)
    tl.store(p_out + o_tile, b_first.to(p_out.dtype.element_ty), mask=m_tile)


def two_product_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    S: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    packed: Tensor,
    row_scale: RowScale,
    *,
    keep_z: bool,
) -> tuple[Tensor, Tensor | None]:
    """`(y, z or None)`, both [M, N] in x's dtype.

    x [M, K], weight [N, K] and S [M, r] share a dtype, bias [N] and lora_B [N, r] may be fp32; any strides.
    `packed` is the mask from `down_projection`. A scaling below 1e-30 in size counts as zero, as in
    `rank_r_gemm`.
    """
    keep_scale = 1.0 / (1.0 - dropout_p)
    rank = S.shape[1]
    if abs(scaling) < 1e-30:
        scaling, rank = 1.0, 0
    return _launch(
        x,
        weight.t(),
        bias,
        S,
        lora_B.t(),
        rank,
        scaling,
        keep_scale / scaling,
        dropout_p,
        None,
        packed,
        row_scale,
        None,
        keep_z=keep_z,
    )


def two_product_backward(
    dy: Tensor,
    weight: Tensor,
    dS: Tensor,
    lora_A: Tensor,
    dropout_p: float,
    seed: Tensor,
    c: Tensor,
) -> Tensor:
    """`dx [M, K]` in dY's dtype; dy [M, N], weight [N, K], dS [M, r] share it, lora_A [r, K] may be fp32.

    c is [N], fp32 and contiguous.
    """
    keep_scale = 1.0 / (1.0 - dropout_p)
    dx, _ = _launch(
        dy, weight, None, dS, lora_A, dS.shape[1], keep_scale, 1.0, dropout_p, seed, None, None, c
    )
    return dx


def _launch(
    p: Tensor,
    q: Tensor,
    bias: Tensor | None,
    low: Tensor,
    r: Tensor,
    rank: int,
    scale: float,
    second_scale: float,
    dropout_p: float,
    seed: Tensor | None,
    packed: Tensor | None,
    row_scale: RowScale | None,
    c: Tensor | None,
    *,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    m, k = p.shape
    n = q.shape[1]
    is_forward = packed is not None
    kernel = configs.RANK_R_GEMM_DORA_DROPOUT if is_forward else configs.RANK_R_GEMM_DORA_DROPOUT_BACKWARD
    config = configs.select_gemm(kernel, p, q, launch.unit_count(p.device))
    out = launch.empty((m, n), p.dtype, p)
    z = launch.empty((m, n), p.dtype, p) if keep_z else None
    grid = (launch.cdiv(m, config.block_m) * launch.cdiv(n, config.block_n),)
    two_product_gemm_kernel[grid](
        p,
        q,
        low,
        r,
        bias,
        row_scale.magnitude if row_scale is not None else None,
        row_scale.norm if row_scale is not None else None,
        c,
        out,
        z,
        seed,
        packed,
        m,
        n,
        k,
        rank,
        p.stride(0),
        p.stride(1),
        q.stride(0),
        q.stride(1),
        low.stride(0),
        low.stride(1),
        r.stride(0),
        r.stride(1),
        bias.stride(0) if bias is not None else 0,
        row_scale.magnitude.stride(0) if row_scale is not None else 0,
        packed.stride(0) if packed is not None else 0,
        scale,
        second_scale,
        dropout_p,
        IS_FORWARD=is_forward,
        HAS_BIAS=bias is not None,
        KEEP_Z=keep_z,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.r_tile(low.shape[1]),
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
        **configs.all_registers(p.device),
    )
    return out, z
