"""The path through cuBLAS (hipBLAS): the vendor's GEMM for x W^T, then one pass over its result.

    y = x W^T                                   torch.mm
    S = drop(x) A^T                             down_projection
    y = c * (y + s S B^T) + bias                expand_scale_     one read and one write of y, in place

It costs 2Y bytes more than the fused GEMM, modelled as 533/K of the base GEMM's time on an H100 (3.0 TB/s,
800 TFLOP/s), and wins where a Triton GEMM is slower than cuBLAS by more than that. The same kernel ends
backward's `dx = dY W + mask * (dS A) / (1 - p)`: `expand_add_`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .check import check_operands, check_row_scale
from .down_projection import down_projection
from .dropout import keep_mask
from .primitives import grouped_tile, load_row_scale, low_product


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def expand_kernel(
    p_base: tl.tensor,
    p_y: tl.tensor,
    p_l: tl.tensor,
    p_r: tl.tensor,
    p_bias: tl.tensor,
    p_magnitude: tl.tensor,
    p_norm: tl.tensor,
    p_z: tl.tensor,
    p_seed: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    R: tl.tensor,
    stride_lm: tl.tensor,
    stride_lr: tl.tensor,
    stride_rr: tl.tensor,
    stride_rn: tl.tensor,
    stride_bias: tl.tensor,
    stride_magnitude: tl.tensor,
    scale: tl.tensor,
    dropout_p: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_MAGNITUDE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KEEP_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One program, one tile of y [M, N] and z, made of base, all contiguous; L [M, R], R [R, N].

    Each element of base is read once, before its place is written: y may be the same memory.
    """
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N
    o_y = o_m[:, None] * N + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]

    b_y = tl.load(p_base + o_y, mask=m_y, other=0.0).to(tl.float32)
    b_low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_low = low_product(
        b_low, p_l, p_r, o_m, m_m, o_n, m_n, R, stride_lm, stride_lr, stride_rr, stride_rn, BLOCK_R
    )
    if HAS_DROPOUT:
        b_low = tl.where(keep_mask(p_seed, dropout_p, o_m, i_n * BLOCK_N, N, BLOCK_N), b_low, 0.0)
    b_y += b_low * scale
    if KEEP_Z:
        tl.store(p_z + o_y, b_y.to(p_z.dtype.element_ty), mask=m_y)
    if HAS_MAGNITUDE:
        b_c, _ = load_row_scale(p_magnitude, p_norm, stride_magnitude, o_n, m_n)
        b_y *= b_c[None, :]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


def expand_scale_(
    y: Tensor,
    S: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """`y = c * (y + scaling * S B^T) + bias` in place, c = magnitude / norm (1 without a magnitude).

    Args:
        y: [M, N], contiguous, holding x W^T; fp32, fp16 or bf16.
        S: [M, r] in y's dtype, any strides and any r.
        lora_B: [N, r], in y's dtype or fp32; converted in registers.
        scaling: a run-time number, applied in fp32.
        bias: [N] of any floating dtype, outside the row scale.
        magnitude: [N], DoRA's m.
        norm: [N] fp32 contiguous, with magnitude.
        z: [M, N], contiguous, in y's dtype: receives `y + scaling * S B^T`, before the row scale.

    Returns: y.
    """
    if (magnitude is None) != (norm is None):
        raise ValueError("magnitude and norm go together: got only one of them")
    if magnitude is not None and norm is not None:
        check_row_scale(lora_B, magnitude, norm)
    if z is not None and (z.shape != y.shape or z.dtype != y.dtype or not z.is_contiguous()):
        raise ValueError(
            f"expected a contiguous z {list(y.shape)} in {y.dtype}, got {list(z.shape)} in {z.dtype}"
        )
    return _launch(y, y, S, lora_B.t(), float(scaling), bias, magnitude, norm, z, 0.0, None)


def expand_add_(
    out: Tensor, low: Tensor, right: Tensor, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """`out = out + scale * drop(low right)` in place: backward's `dx = dY W + mask * (dS A) / (1 - p)`.

    Args:
        out: [M, K], contiguous, holding dY W.
        low: [M, r] in out's dtype, any strides: dS.
        right: [r, K], in out's dtype or fp32: lora_A.
        scale: applied as given: with dropout, the caller folds `1 / (1 - dropout_p)` into it.
        dropout_p: probability of dropping an element of the product, by the mask that forward had.
        seed: one int64, with dropout.

    Returns: out.
    """
    if dropout_p > 0.0 and seed is None:
        raise ValueError("dropout needs `seed`, a one-element int64 tensor on out's device")
    return _launch(out, out, low, right, float(scale), None, None, None, None, dropout_p, seed)


def expand_add(base: Tensor, low: Tensor, right: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """`base + scale * (low right) + bias` as a new tensor: a bottleneck on a layer's output, its residual.

    Args:
        base: [M, N], contiguous; fp32, fp16 or bf16. It is read once and left as it is.
        low: [M, r] in base's dtype, any strides and any r.
        right: [r, N], in base's dtype or fp32; converted in registers.
        scale: a run-time number, applied in fp32.
        bias: [N] of any floating dtype.
    """
    y = launch.empty(base.shape, base.dtype, base)
    return _launch(base, y, low, right, float(scale), bias, None, None, None, 0.0, None)


def _launch(
    base: Tensor,
    y: Tensor,
    low: Tensor,
    right: Tensor,
    scale: float,
    bias: Tensor | None,
    magnitude: Tensor | None,
    norm: Tensor | None,
    z: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    (m, n), r = y.shape, low.shape[1]
    if low.shape[0] != m or right.shape != (r, n) or low.dtype != y.dtype or not base.is_contiguous():
        raise ValueError(
            f"expected a contiguous [M, N] tensor, [M, r] in its dtype and [r, N]; got {list(y.shape)} with "
            f"strides {base.stride()}, {list(low.shape)} in {low.dtype} under {y.dtype}, {list(right.shape)}"
        )
    if m == 0:
        return y
    config = configs.select(configs.EXPAND, y, r)
    grid = (launch.cdiv(m, config.block_m) * launch.cdiv(n, config.block_n),)
    with launch.on_device(y):
        expand_kernel[grid](
            base,
            y,
            low,
            right,
            bias,
            magnitude,
            norm,
            z,
            seed if dropout_p > 0.0 else None,
            m,
            n,
            r,
            low.stride(0),
            low.stride(1),
            right.stride(0),
            right.stride(1),
            bias.stride(0) if bias is not None else 0,
            magnitude.stride(0) if magnitude is not None else 0,
            scale,
            dropout_p,
            HAS_BIAS=bias is not None,
            HAS_MAGNITUDE=magnitude is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            KEEP_Z=z is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_R=config.r_tile(r),
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=launch.FP_FUSION,
            **configs.all_registers(y.device),
        )
    return y


def lora_forward_expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`lora.lora_forward` through cuBLAS: same arguments, same results `(y, S)`, any r."""
    y, S = _products(x, weight, lora_A, lora_B, dropout_p, seed)
    return expand_scale_(y, S, lora_B, scaling, bias), S


def dora_forward_expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    drop_base: bool,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`dora.dora_forward` through cuBLAS: same arguments, same results `(y, S, z)`, any r.

    Raises:
        ValueError: for drop_base with dropout: PEFT's form needs a second base product, on the dropped x.
    """
    if drop_base and dropout_p > 0.0:
        raise ValueError("drop_base with dropout needs both base products: use dora_forward")
    y, S = _products(x, weight, lora_A, lora_B, dropout_p, seed)
    z = launch.empty((x.shape[0], weight.shape[0]), x.dtype, x) if keep_z else None
    return expand_scale_(y, S, lora_B, scaling, bias, magnitude, norm, z), S, z


def _products(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`x W^T` by the vendor's GEMM, and S."""
    check_operands("x", x, weight.shape[1], weight, lora_A, lora_B, dropout_p, seed)
    if x.shape[0] == 0:
        return x.new_empty((0, weight.shape[0])), x.new_empty((0, lora_A.shape[0]))
    with launch.on_device(x):
        S = down_projection(x, lora_A, 1.0 / (1.0 - dropout_p), dropout_p, seed)
    return torch.mm(x.detach(), weight.detach().t()), S
