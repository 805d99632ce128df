"""LoRA's linear layer, forward and backward, as a sequence of kernels split at S.

Hu et al. 2021, arXiv 2106.09685. With `m = drop's mask / (1 - p)`:

    S  = (m * x) A^T                       down_projection   one read of x
    y  = x W^T + s S B^T + bias            rank_r_gemm       one read of x, W; one write of y
    dS = s dY B,  dB = s dY^T S, dbias     reduce_dy         one read of dY
    dA = dS^T (m * x)                      grad_a            one read of x
    dx = dY W + m * (dS A)                 rank_r_gemm       one read of dY, W; one write of dx

Backward needs x, A, B and S [M, r]; the mask comes back from (seed, p). `B A` and `W + s B A` are never
formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .check import check_backward, check_operands
from .down_projection import down_projection
from .expand import expand_add_
from .gemm import gemm
from .grad_a import grad_a
from .rank_r_gemm import rank_r_gemm
from .reduce_dy import reduce_dy


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    tma: bool = False,
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + scaling * S B^T + bias`.

    Args:
        x: [M, K], fp32, fp16 or bf16, any strides.
        weight: [N, K] in x's dtype, any strides (the transposed view of a Conv1D weight included).
        bias: [N] of any floating dtype, or None.
        lora_A: [r, K], in x's dtype or fp32; converted to x's dtype in registers.
        lora_B: [N, r], as lora_A.
        scaling: a run-time number, applied in fp32; a new value does not compile a new kernel.
        dropout_p: probability of dropping an element of x in front of A, in [0, 1).
        seed: one int64 on x's device, read by the kernels; required when dropout_p > 0.
        tma: whether the GEMM goes by TMA where it can (`gemm`).

    Returns:
        y [M, N] and S [M, r], both in x's dtype and contiguous. S is unscaled; backward wants it as it is.
    """
    check_operands("x", x, weight.shape[1], weight, lora_A, lora_B, dropout_p, seed)
    (m, _), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    if m == 0:
        return x.new_empty((0, n)), x.new_empty((0, r))
    with launch.on_device(x):
        S = down_projection(x, lora_A, 1.0 / (1.0 - dropout_p), dropout_p, seed)
        y, _ = gemm(x, weight.t(), S, lora_B.t(), bias, float(scaling), tma=tma)
    return y, S


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    need_x: bool,
    need_A: bool,
    need_B: bool,
    need_bias: bool,
    bias_dtype: torch.dtype | None = None,
    vendor_gemm: bool = False,
    tma: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients `(dx, dA, dB, dbias)` of `lora_forward`; what is not asked for is None and costs nothing.

    Args:
        dy: [M, N] in the weight's dtype, any strides (an expanded gradient included).
        x: [M, K] as in forward; None is fine when need_A is false.
        weight: as in forward, like lora_A and lora_B.
        lora_A: as in forward.
        lora_B: as in forward.
        S: [M, r] from forward.
        scaling: as in forward, like dropout_p and seed, which give the same mask again.
        dropout_p: as in forward.
        seed: as in forward.
        need_x: whether dx is wanted; the other flags likewise.
        need_A: whether dA is wanted.
        need_B: whether dB is wanted.
        need_bias: whether dbias is wanted.
        bias_dtype: dtype of dbias; dy's when None.
        vendor_gemm: dx by the vendor's GEMM and one pass that adds the rank-r product to it.
        tma: as in forward, for dx; without dropout.

    Returns: dx [M, K] in dy's dtype; dA, dB, dbias in the dtypes of A, B and bias, each rounded once, from
    fp32 sums.
    """
    check_operands("dy", dy, weight.shape[0], weight, lora_A, lora_B, dropout_p, seed)
    (m, n), k = dy.shape, weight.shape[1]
    check_backward(dy, x if need_A else None, weight, S)
    if need_A and x is None:
        raise ValueError("dA needs x")
    sum_dtype = (bias_dtype or dy.dtype) if need_bias else None
    if m == 0:
        return (
            dy.new_empty((0, k)) if need_x else None,
            torch.zeros_like(lora_A, memory_format=torch.contiguous_format) if need_A else None,
            torch.zeros_like(lora_B, memory_format=torch.contiguous_format) if need_B else None,
            dy.new_zeros((n,), dtype=sum_dtype) if need_bias else None,
        )
    keep_scale = 1.0 / (1.0 - dropout_p)
    with launch.on_device(dy):
        dS, dB, dbias, _ = reduce_dy(
            dy, lora_B, S, float(scaling), need_S=need_x or need_A, need_B=need_B, bias_dtype=sum_dtype
        )
        dA = None
        if need_A and x is not None and dS is not None:
            dA, _, _ = grad_a(x, dS, keep_scale, dropout_p, seed, dtype=lora_A.dtype)
        dx = None
        if need_x and dS is not None and vendor_gemm:
            dx = expand_add_(torch.mm(dy, weight), dS, lora_A, keep_scale, dropout_p, seed)
        elif need_x and dS is not None and dropout_p == 0.0:
            dx, _ = gemm(dy, weight, dS, lora_A, None, 1.0, tma=tma)
        elif need_x and dS is not None:
            dx, _ = rank_r_gemm(dy, weight, dS, lora_A, None, keep_scale, dropout_p, seed)
    return dx, dA, dB, dbias
