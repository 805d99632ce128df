"""DoRA's linear layer, forward and backward, as a sequence of kernels split at S.

Liu et al. 2024, arXiv 2402.09353, in torch's [out, in] weights. With `n = ||W + s B A||` of each row,
`c = m / n` detached (section 4.3 of the paper), and `drop(x) = mask * x / (1 - p)`:

    n  = ||W + s B A||                                      row_norm            one read of W
    S  = drop(x) A^T                                        down_projection     one read of x
    y  = c * (x W^T + s S B^T) + bias                       rank_r_gemm         one read of x, W; write of y
    g  = c * dY                                             never written
    dS = s g B, dB = s g^T S, dm = colsum(dY * z) / n       reduce_dy           one read of dY and of y or z
    dA = dS^T drop(x)                                       grad_a              one read of x
    dx = g W + mask * (dS A) / (1 - p)                      rank_r_gemm         one read of dY, W; write of dx

PEFT and the paper's code put the row scale's excess on the base product of the *dropped* input (`drop_base`),
which differs under dropout only; both base products then come from one read (two_product_gemm):

    y  = x W^T + (c - 1) * (drop(x) W^T) + c * s S B^T + bias
    dx = dY W + mask * (((c - 1) * dY) W + dS A) / (1 - p)

z is the product before the row scale, `drop(x) W^T + s S B^T` with `drop_base`, else `x W^T + s S B^T`. Where
`y = c z`, that is without bias and without `drop_base` dropout, dm is had from y (`row_scale.py` keeps c off
zero for it); elsewhere, or in fp16, whose range ends at 2^-24, ask forward to keep z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .check import check_backward, check_operands, check_row_scale
from .down_projection import down_projection
from .dropout import packed_like
from .factored_norm import row_norm
from .gemm import gemm
from .grad_a import grad_a
from .primitives import KeptProduct, RowScale
from .rank_r_gemm import rank_r_gemm
from .reduce_dy import reduce_dy
from .two_product_gemm import two_product_backward, two_product_forward

__all__ = ["dora_backward", "dora_forward", "row_norm"]


def dora_forward(
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
    tma: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`y = c * (x W^T + s S B^T) + bias`, or PEFT's form under dropout (module docstring).

    Args:
        x: [M, K], fp32, fp16 or bf16, any strides.
        weight: [N, K] in x's dtype, any strides (the transposed view of a Conv1D weight included).
        bias: [N] of any floating dtype, or None; outside the row scale.
        lora_A: [r, K], in x's dtype or fp32; converted to x's dtype in registers.
        lora_B: [N, r], as lora_A.
        magnitude: [N], m, of any floating dtype.
        norm: [N] fp32 contiguous, from `row_norm`.
        scaling: a run-time number, applied in fp32.
        dropout_p: probability of dropping an element of x, in [0, 1).
        seed: one int64 on x's device, read by the kernels; required when dropout_p > 0.
        drop_base: PEFT's dropout, on the base product too; without dropout it makes no difference.
        keep_z: whether z is wanted, for dm in backward.
        tma: whether the GEMM goes by TMA where it can (`gemm`).

    Returns: y [M, N], S [M, r] and z [M, N] or None, in x's dtype and contiguous. S is unscaled.
    """
    check_operands("x", x, weight.shape[1], weight, lora_A, lora_B, dropout_p, seed)
    check_row_scale(weight, magnitude, norm)
    m, n, r = x.shape[0], weight.shape[0], lora_A.shape[0]
    if m == 0:
        return x.new_empty((0, n)), x.new_empty((0, r)), x.new_empty((0, n)) if keep_z else None
    keep_scale, scaling = 1.0 / (1.0 - dropout_p), float(scaling)
    row_scale = RowScale(magnitude=magnitude, norm=norm)
    with launch.on_device(x):
        if drop_base and dropout_p > 0.0:
            packed = packed_like(x)
            S = down_projection(x, lora_A, keep_scale, dropout_p, seed, packed=packed)
            y, z = two_product_forward(
                x, weight, bias, S, lora_B, scaling, dropout_p, packed, row_scale, keep_z=keep_z
            )
        else:
            S = down_projection(x, lora_A, keep_scale, dropout_p, seed)
            y, z = gemm(
                x, weight.t(), S, lora_B.t(), bias, scaling, row_scale=row_scale, keep_z=keep_z, tma=tma
            )
    return y, S, z


def dora_backward(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    drop_base: bool,
    kept_is_z: bool,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_m: bool,
    need_bias: bool,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients `(dx, dA, dB, dm, dbias)` of `dora_forward`; what is not asked for is None and costs nothing.

    Args:
        dy: [M, N] in the weight's dtype, any strides (an expanded gradient included).
        x: [M, K] as in forward; None is fine when need_A is false.
        kept: [M, N], z or y of forward; None is fine when need_m is false.
        weight: as in forward, like lora_A, lora_B, magnitude and norm.
        lora_A: as in forward.
        lora_B: as in forward.
        magnitude: as in forward.
        norm: as in forward.
        S: [M, r] from forward.
        scaling: as in forward, like dropout_p, seed and drop_base.
        dropout_p: as in forward.
        seed: as in forward; gives the same mask again.
        drop_base: as in forward.
        kept_is_z: whether `kept` is z; y only fits where `y = c z` (module docstring).
        need_x: whether dx is wanted; the other flags likewise.
        need_A: whether dA is wanted.
        need_B: whether dB is wanted.
        need_m: whether dm is wanted.
        need_bias: whether dbias is wanted.
        bias_dtype: dtype of dbias; dy's when None.

    Returns: dx [M, K] in dy's dtype; dA, dB, dm, dbias in the dtypes of A, B, m and bias, each rounded once,
    from fp32 sums.
    """
    check_operands("dy", dy, weight.shape[0], weight, lora_A, lora_B, dropout_p, seed)
    check_row_scale(weight, magnitude, norm)
    check_backward(dy, x if need_A else None, weight, S)
    (m, n), k = dy.shape, weight.shape[1]
    if need_A and x is None:
        raise ValueError("dA needs x")
    if need_m and (kept is None or kept.shape != (m, n)):
        raise ValueError(f"dm needs kept {[m, n]}, got {None if kept is None else list(kept.shape)}")
    sum_dtype = (bias_dtype or dy.dtype) if need_bias else None
    if m == 0:
        return (
            dy.new_empty((0, k)) if need_x else None,
            torch.zeros_like(lora_A, memory_format=torch.contiguous_format) if need_A else None,
            torch.zeros_like(lora_B, memory_format=torch.contiguous_format) if need_B else None,
            torch.zeros_like(magnitude, memory_format=torch.contiguous_format) if need_m else None,
            dy.new_zeros((n,), dtype=sum_dtype) if need_bias else None,
        )
    if not (need_x or need_A or need_B or need_m or need_bias):
        return None, None, None, None, None
    keep_scale = 1.0 / (1.0 - dropout_p)
    product = None
    if need_m and kept is not None:
        product = KeptProduct(values=kept.contiguous(), is_z=kept_is_z)
    with launch.on_device(dy):
        c = launch.empty((n,), torch.float32, dy)
        dS, dB, dbias, dm = reduce_dy(
            dy,
            lora_B,
            S,
            float(scaling),
            need_S=need_x or need_A,
            need_B=need_B,
            bias_dtype=sum_dtype,
            row_scale=RowScale(magnitude=magnitude, norm=norm, c=c),
            kept=product,
        )
        dA = None
        if need_A and x is not None and dS is not None:
            dA, _, _ = grad_a(x, dS, keep_scale, dropout_p, seed, dtype=lora_A.dtype)
        dx = None
        if need_x and dS is not None:
            if drop_base and dropout_p > 0.0 and seed is not None:
                dx = two_product_backward(dy, weight, dS, lora_A, dropout_p, seed, c)
            else:
                dx, _ = rank_r_gemm(
                    dy, weight, dS, lora_A, None, keep_scale, dropout_p, seed, scale_reduction=c
                )
    return dx, dA, dB, dm, dbias
