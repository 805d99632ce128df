"""`out = P Q + scale * drop(L R) + bias`: a GEMM whose epilogue adds a product of rank r.

Forward: `y = x W^T + s S B^T + bias`. Backward: `dx = dY W + mask * (dS A) / (1 - p)`. The roles are chosen
by strides alone, so a transposed weight (transformers' Conv1D) needs no copy.

The rank-r product comes after the K loop. Before it, its operands would sit in shared memory beside the
GEMM's own pipeline: 48 KiB more at r = 64, and no fit at r = 128 on sm_90 (245,784 of 232,448 bytes).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import keep_mask


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def rank_r_gemm_kernel(
    p_p: tl.tensor,
    p_q: tl.tensor,
    p_l: tl.tensor,
    p_r: tl.tensor,
    p_bias: tl.tensor,
    p_out: tl.tensor,
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
    scale: tl.tensor,
    inverse_scale: tl.tensor,
    dropout_p: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One program, one tile of out [M, N] (contiguous); P [M, K], Q [K, N], L [M, R], R [R, N], bias [N]."""
    # Tiles run in groups of GROUP_M rows of tiles, so that neighbours in time share P and Q tiles in L2.
    i_tile = tl.program_id(0)
    n_m = tl.cdiv(M, BLOCK_M)
    n_n = tl.cdiv(N, BLOCK_N)
    tiles_in_group = GROUP_M * n_n
    first_m = (i_tile // tiles_in_group) * GROUP_M
    rows_in_group = tl.minimum(n_m - first_m, GROUP_M)
    i_m = first_m + (i_tile % tiles_in_group) % rows_in_group
    i_n = (i_tile % tiles_in_group) // rows_in_group

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
        b_acc = tl.dot(b_p, b_q, b_acc, input_precision="ieee")

    # Without dropout the rank-r product is accumulated on top of the base product: a second accumulator of
    # 128x256 would spill. The scale then goes in as `(acc / scale + L R) * scale`, two fp32 roundings
    # (2^-24), instead of rounding scale * L or scale * R to 16 bits (2^-9).
    b_low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) if HAS_DROPOUT else b_acc * inverse_scale
    # One stage: the loop usually runs once, and a pipeline would need shared memory of its own.
    for i_r in tl.range(0, tl.cdiv(R, BLOCK_R), num_stages=1):
        o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        m_r = o_r < R
        b_l = tl.load(
            p_l + o_m[:, None] * stride_lm + o_r[None, :] * stride_lr,
            mask=m_m[:, None] & m_r[None, :],
            other=0.0,
        )
        b_r = tl.load(
            p_r + o_r[:, None] * stride_rr + o_n[None, :] * stride_rn,
            mask=m_r[:, None] & m_n[None, :],
            other=0.0,
        )
        b_low = tl.dot(b_l, b_r.to(b_l.dtype), b_low, input_precision="ieee")
    if HAS_DROPOUT:
        b_keep = keep_mask(p_seed, dropout_p, o_m, i_n * BLOCK_N, N, BLOCK_N)
        b_acc += tl.where(b_keep, b_low, 0.0) * scale
    else:
        b_acc = b_low * scale
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_tile = p_out + o_m[:, None] * N + o_n[None, :]
    tl.store(p_tile, b_acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def rank_r_gemm(
    p: Tensor,
    q: Tensor,
    low: Tensor,
    r: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`out [M, N] = p[M, K] q[K, N] + scale * drop(low[M, r] r[r, N]) + bias[N]` in p's dtype.

    q and low have p's dtype; r and bias may be fp32 under 16-bit p. Any strides. A scale below 1e-30 in size
    counts as zero: its reciprocal times the accumulator could leave fp32's range.
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
    kernel = configs.RANK_R_GEMM_DROPOUT if has_dropout else configs.RANK_R_GEMM
    config = configs.select_gemm(kernel, p, q, launch.unit_count(p.device))
    out = launch.empty((m, n), p.dtype, p)
    grid = (launch.cdiv(m, config.block_m) * launch.cdiv(n, config.block_n),)
    rank_r_gemm_kernel[grid](
        p,
        q,
        low,
        r,
        bias,
        out,
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
        scale,
        inverse_scale,
        dropout_p,
        HAS_BIAS=bias is not None,
        HAS_DROPOUT=has_dropout,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=config.r_tile(low.shape[1]),
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return out
