"""`out = P Q + scale * drop(L R) + bias`: a GEMM whose epilogue adds a rank-r product and DoRA's row scale.

Forward: `y = c * (x W^T + s S B^T) + bias`. Backward: `dx = (c * dY) W + mask * (dS A) / (1 - p)`; c is 1 in
LoRA. The roles are chosen by strides alone, so a transposed weight (transformers' Conv1D) needs no copy. In
forward, c belongs to the columns of the result and is applied in the epilogue; in backward it belongs to the
reduction, where it multiplies dY's tile in registers, so `c * dY` is never written.

The rank-r product comes after the K loop. Before it, its operands would sit in shared memory beside the
GEMM's own pipeline: 48 KiB more at r = 64, and no fit at r = 128 on sm_90 (245,784 of 232,448 bytes).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import keep_mask
from .primitives import RowScale, grouped_tile, load_row_scale, low_product


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def rank_r_gemm_kernel(
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
    scale: tl.tensor,
    inverse_scale: tl.tensor,
    dropout_p: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALE_REDUCTION: tl.constexpr,
    KEEP_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One program, one tile of out [M, N] (contiguous, like z); P [M, K], Q [K, N], L [M, R], R [R, N]."""
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N

    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
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
        if SCALE_REDUCTION:
            b_c = tl.load(p_c + o_k, mask=m_k, other=0.0)
            b_p = (b_p.to(tl.float32) * b_c[None, :]).to(b_q.dtype)
        b_acc = tl.dot(b_p, b_q, b_acc, input_precision="ieee")

    # Without dropout the rank-r product is accumulated on top of the base product: a second accumulator of
    # 128x256 would spill. The scale then goes in as `(acc / scale + L R) * scale`, two fp32 roundings
    # (2^-24), instead of rounding scale * L or scale * R to 16 bits (2^-9).
    b_low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) if HAS_DROPOUT else b_acc * inverse_scale
    b_low = low_product(
        b_low, p_l, p_r, o_m, m_m, o_n, m_n, R, stride_lm, stride_lr, stride_rr, stride_rn, BLOCK_R
    )
    if HAS_DROPOUT:
        b_keep = keep_mask(p_seed, dropout_p, o_m, i_n * BLOCK_N, N, BLOCK_N)
        b_acc += tl.where(b_keep, b_low, 0.0) * scale
    else:
        b_acc = b_low * scale
    o_tile = o_m[:, None] * N + o_n[None, :]
    m_tile = m_m[:, None] & m_n[None, :]
    if KEEP_Z:
        tl.store(p_z + o_tile, b_acc.to(p_z.dtype.element_ty), mask=m_tile)
    if SCALE_COLUMNS:
        b_c, _ = load_row_scale(p_magnitude, p_norm, stride_magnitude, o_n, m_n)
        b_acc *= b_c[None, :]
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out + o_tile, b_acc.to(p_out.dtype.element_ty), mask=m_tile)


def rank_r_gemm(
    p: Tensor,
    q: Tensor,
    low: Tensor,
    r: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    scale_columns: RowScale | None = None,
    scale_reduction: Tensor | None = None,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`z = (p * c_k) q + scale * drop(low r)`, `out = c_n * z + bias`, both [M, N] in p's dtype.

    q and low have p's dtype; r and bias may be fp32 under 16-bit p. Any strides. A scale below 1e-30 in size
    counts as zero: its reciprocal times the accumulator could leave fp32's range.

    Args:
        p: [M, K].
        q: [K, N].
        low: [M, rank].
        r: [rank, N].
        bias: [N], or None.
        scale: applied in fp32; with dropout, the caller folds `1 / (1 - dropout_p)` into it.
        dropout_p: probability of dropping an element of `low r`.
        seed: one int64, with dropout.
        scale_columns: c_n [N], divided in the epilogue; 1 when None.
        scale_reduction: c_k [K] fp32 contiguous; 1 when None.
        keep_z: whether z is wanted too.

    Returns: `(out, z or None)`.
    """
    m, k = p.shape
    n = q.shape[1]
    rank = low.shape[1]
    has_dropout = dropout_p > 0.0
    inverse_scale = 1.0
    if abs(scale) < 1e-30:
        scale, rank, has_dropout = 1.0, 0, False  # an empty rank-r loop: same kernel, no branch in it
    elif not has_dropout:
        inverse_scale = 1.0 / scale
    if scale_reduction is not None:
        kernel = configs.RANK_R_GEMM_DORA_BACKWARD
        if has_dropout:
            kernel = configs.RANK_R_GEMM_DORA_DROPOUT_BACKWARD
    elif scale_columns is not None:
        kernel = configs.RANK_R_GEMM_DORA_Z if keep_z else configs.RANK_R_GEMM_DORA
    else:
        kernel = configs.RANK_R_GEMM_DROPOUT if has_dropout else configs.RANK_R_GEMM
    config = configs.select_gemm(kernel, p, q, launch.unit_count(p.device))
    out = launch.empty((m, n), p.dtype, p)
    z = launch.empty((m, n), p.dtype, p) if keep_z else None
    grid = (launch.cdiv(m, config.block_m) * launch.cdiv(n, config.block_n),)
    rank_r_gemm_kernel[grid](
        p,
        q,
        low,
        r,
        bias,
        scale_columns.magnitude if scale_columns is not None else None,
        scale_columns.norm if scale_columns is not None else None,
        scale_reduction,
        out,
        z,
        seed if has_dropout else None,
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
        scale_columns.magnitude.stride(0) if scale_columns is not None else 0,
        scale,
        inverse_scale,
        dropout_p,
        HAS_BIAS=bias is not None,
        HAS_DROPOUT=has_dropout,
        SCALE_COLUMNS=scale_columns is not None,
        SCALE_REDUCTION=scale_reduction is not None,
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
