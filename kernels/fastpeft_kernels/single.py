"""LoRA's and DoRA's forward in one kernel, for few tokens and a small rank.

One K loop makes every product that needs x or W, each tile of which is in shared memory already:

    acc += x W^T                     the base product
    S   += x A^T                     once more in every column tile: r / BLOCK_N extra tensor work
    n^2 += sum((W + s B A)^2)        DoRA without a given norm: r / BLOCK_M extra, in every row tile

and the epilogue adds `s S B^T`, multiplies by c = m/n and adds the bias. Programs of the first column tile
write S for backward, programs of the first row tile write n.

The norm sums the squares of the adapted weight's own tile, `W + s B A` in registers, and not the factored
`||W||^2 + 2s B.U + s^2 B G B^T` with U = W A^T, G = A A^T. Both cost one product of the same size a step; the
sum of squares has nothing to cancel or clamp and no U and G to hold. Compiled for sm_90 at 128x128x64 over 8
warps, it takes 216, 230 and 240 registers at r = 16, 32 and 64; the factored form 178, 255 with a spill, 255.

When it wins (modelled, not measured; `when.prefers_single` is this rule). A launch takes
`max(bytes / bandwidth, FLOPs / rate)` and a fixed cost t:

    split     t + 2MK/bw  +  t + max((2MK + 2NK + 2MN)/bw, 2MNK/f)   [+ t + 2NK/bw for DoRA's norm]
    single    t + max((2MK + 2NK + 2MN)/bw, (2MNK/f) (1 + r/BLOCK_N [+ r/BLOCK_M]))

It saves a launch and a read of x [and a launch and a read of W], and pays in tensor work: nothing while W's
read is what takes the time (M below f/bw, 267 on an H100), and above only as much as is saved.

No dropout: each of the N / BLOCK_N column tiles would draw the mask of x again, counted as 1,300 cycles of
integer work a 64x64 step (1024 Philox calls of about 80 instructions, 64 lanes a cycle) beside the 630 that
the read of W's tile takes at 3.0 TB/s over 132 multiprocessors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .check import check_operands, check_row_scale
from .factored_norm import row_norm
from .primitives import grouped_tile
from .row_scale import row_scale
from .when import MAX_RANK


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def single_kernel(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_a: tl.tensor,
    p_b: tl.tensor,
    p_bias: tl.tensor,
    p_m: tl.tensor,
    p_norm: tl.tensor,
    p_y: tl.tensor,
    p_s: tl.tensor,
    p_z: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    stride_bias: tl.tensor,
    stride_m: tl.tensor,
    n_used: tl.tensor,
    scale: tl.tensor,
    inverse_scale: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_MAGNITUDE: tl.constexpr,
    SUM_NORM: tl.constexpr,
    KEEP_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One program, one tile of y [M, N]; y, z, S [M, R] and norm [N] are contiguous; norm is read or written.

    `n_used` of B's R columns count: R, or 0 where the scaling is 0.
    """
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    m_m = o_m < M
    m_n = o_n < N
    m_r = o_r < R

    if SUM_NORM:
        b_b = tl.load(
            p_b + o_n[:, None] * stride_bn + o_r[None, :] * stride_br,
            mask=m_n[:, None] & (o_r < n_used)[None, :],
            other=0.0,
        ).to(p_x.dtype.element_ty)
        b_squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BLOCK_K)):
        o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < K
        b_x = tl.load(
            p_x + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk,
            mask=m_m[:, None] & m_k[None, :],
            other=0.0,
        )
        b_w = tl.load(
            p_w + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk,
            mask=m_n[:, None] & m_k[None, :],
            other=0.0,
        )
        b_a = tl.load(
            p_a + o_r[:, None] * stride_ar + o_k[None, :] * stride_ak,
            mask=m_r[:, None] & m_k[None, :],
            other=0.0,
        ).to(b_x.dtype)
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, input_precision="ieee")
        if SUM_NORM:
            b_adapted = b_w.to(tl.float32) + tl.dot(b_b, b_a, input_precision="ieee") * scale
            b_squares += tl.sum(b_adapted * b_adapted, axis=1)
        b_s = tl.dot(b_x, tl.trans(b_a), b_s, input_precision="ieee")

    b_s = b_s.to(p_x.dtype.element_ty)
    if i_n == 0:
        tl.store(p_s + o_m[:, None] * R + o_r[None, :], b_s, mask=m_m[:, None] & m_r[None, :])

    # (acc / scale + S B^T) * scale: a second accumulator would spill, see rank_r_gemm.
    b_bt = tl.load(
        p_b + o_r[:, None] * stride_br + o_n[None, :] * stride_bn,
        mask=(o_r < n_used)[:, None] & m_n[None, :],
        other=0.0,
    ).to(p_x.dtype.element_ty)
    b_acc = tl.dot(b_s, b_bt, b_acc * inverse_scale, input_precision="ieee") * scale

    o_y = o_m[:, None] * N + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if HAS_MAGNITUDE:
        if KEEP_Z:
            tl.store(p_z + o_y, b_acc.to(p_z.dtype.element_ty), mask=m_y)
        if SUM_NORM:
            b_norm = tl.sqrt_rn(b_squares)
            if i_m == 0:
                tl.store(p_norm + o_n, b_norm, mask=m_n)
        else:
            b_norm = tl.load(p_norm + o_n, mask=m_n, other=0.0)
        b_m = tl.load(p_m + o_n * stride_m, mask=m_n, other=0.0).to(tl.float32)
        b_acc *= row_scale(b_m, b_norm)[None, :]
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_y, b_acc.to(p_y.dtype.element_ty), mask=m_y)


def lora_forward_single(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`S = x A^T`, `y = x W^T + scaling * S B^T + bias` in one launch.

    Arguments and results as `lora.lora_forward`; ValueError for r above MAX_RANK, and for dropout, whose mask
    every column tile would draw again (module docstring).
    """
    _check(x, weight, lora_A, lora_B, dropout_p, seed)
    y, S, _ = _launch(x, weight, bias, lora_A, lora_B, None, None, scaling)
    return y, S


def dora_forward_single(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`y = c * (x W^T + scaling * S B^T) + bias`, c = magnitude / norm, in one launch.

    Without a norm the same launch makes it from the W it reads anyway; `row_norm` does where the table has no
    row for that (r above 32 in fp32, above 16 with unaligned rows), or where there are no tokens.

    Args: as `dora.dora_forward`; norm is [N] fp32, or None. ValueError as `lora_forward_single`.

    Returns: y [M, N], S [M, r] and, with keep_z, z [M, N] before the row scale, in x's dtype; norm [N], fp32.
    """
    _check(x, weight, lora_A, lora_B, dropout_p, seed)
    covered = max(row.block_r for row in configs.rows(configs.SINGLE_NORM, x, weight))
    sums_norm = norm is None and lora_A.shape[0] <= covered and x.shape[0] > 0
    if norm is None:
        if sums_norm:
            norm = launch.empty((weight.shape[0],), torch.float32, x)
        else:
            norm = row_norm(weight, lora_A, lora_B, float(scaling))
    check_row_scale(weight, magnitude, norm)
    y, S, z = _launch(
        x,
        weight,
        bias,
        lora_A,
        lora_B,
        magnitude,
        norm,
        scaling,
        sums_norm=sums_norm,
        keep_z=keep_z,
    )
    return y, S, z, norm


def _check(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, dropout_p: float, seed: Tensor | None
) -> None:
    check_operands("x", x, weight.shape[1], weight, lora_A, lora_B, dropout_p, seed)
    if lora_A.shape[0] > MAX_RANK or dropout_p > 0.0:
        raise ValueError(
            f"the single-kernel forward takes r up to {MAX_RANK} and no dropout, got r = {lora_A.shape[0]}, "
            f"dropout_p = {dropout_p}: use the split forward"
        )


def _select(key: str, x: Tensor, weight: Tensor, r: int) -> configs.KernelConfig:
    """Of the rows whose rank tile covers `r`, the largest tile that gives each unit one, or the last."""
    fitting = [row for row in configs.rows(key, x, weight) if row.block_r >= r]
    units = launch.unit_count(x.device)
    for row in fitting:
        if launch.cdiv(x.shape[0], row.block_m) * launch.cdiv(weight.shape[0], row.block_n) >= units:
            return row
    return fitting[-1]


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    norm: Tensor | None,
    scaling: float,
    *,
    sums_norm: bool = False,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    y, S = launch.empty((m, n), x.dtype, x), launch.empty((m, r), x.dtype, x)
    z = launch.empty((m, n), x.dtype, x) if keep_z else None
    if m == 0:
        return y, S, z
    scale, n_used = (float(scaling), r) if abs(scaling) >= 1e-30 else (1.0, 0)
    config = _select(configs.SINGLE_NORM if sums_norm else configs.SINGLE, x, weight, r)
    grid = (launch.cdiv(m, config.block_m) * launch.cdiv(n, config.block_n),)
    with launch.on_device(x):
        single_kernel[grid](
            x,
            weight,
            lora_A,
            lora_B,
            bias,
            magnitude,
            norm,
            y,
            S,
            z,
            m,
            n,
            k,
            r,
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            weight.stride(1),
            lora_A.stride(0),
            lora_A.stride(1),
            lora_B.stride(0),
            lora_B.stride(1),
            bias.stride(0) if bias is not None else 0,
            magnitude.stride(0) if magnitude is not None else 0,
            n_used,
            scale,
            1.0 / scale,
            HAS_BIAS=bias is not None,
            HAS_MAGNITUDE=magnitude is not None,
            SUM_NORM=sums_norm,
            KEEP_Z=keep_z,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=config.r_tile(r),
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=launch.FP_FUSION,
        )
    return y, S, z
