"""LoRA's linear layer, forward and backward, as a sequence of kernels split at S.

Hu et al. 2021, arXiv 2106.09685. With `m = drop's mask / (1 - p)`:

    S  = (m * x) A^T                       down_projection   one read of x
    y  = x W^T + s S B^T + bias            rank_r_gemm       one read of x, W; one write of y
    dS = s dY B,  dB = s dY^T S, dbias     grad_s_b          one read of dY
    dA = dS^T (m * x)                      grad_a            one read of x
    dx = dY W + m * (dS A)                 rank_r_gemm       one read of dY, W; one write of dx

Backward needs x, A, B and S [M, r]; the mask comes back from (seed, p). `B A` and `W + s B A` are never
formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .down_projection import down_projection
from .grad_a import grad_a
from .grad_s_b import MAX_RANK, grad_s_b
from .rank_r_gemm import rank_r_gemm

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(
    name: str,
    wide: Tensor,
    width: int,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    seed: object,
) -> None:
    """The kernels trust shapes and dtypes: a wrong one would read out of bounds, so it stops here."""
    (n, k), r = weight.shape, lora_A.shape[0]
    if wide.dim() != 2 or wide.shape[1] != width or lora_A.shape != (r, k) or lora_B.shape != (n, r):
        raise ValueError(
            f"expected {name} [M, {width}], weight [N, K], lora_A [r, K], lora_B [N, r]; got {name} "
            f"{list(wide.shape)}, weight {[n, k]}, lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}"
        )
    if wide.dtype not in SUPPORTED_DTYPES or weight.dtype != wide.dtype:
        raise TypeError(
            f"{name} and weight must share float32, float16 or bfloat16; got {wide.dtype}, {weight.dtype}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0 and not (isinstance(seed, Tensor) and seed.numel() == 1 and seed.dtype == torch.int64):
        raise ValueError("dropout needs `seed`, a one-element int64 tensor on x's device")


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
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

    Returns:
        y [M, N] and S [M, r], both in x's dtype and contiguous. S is unscaled; backward wants it as it is.
    """
    _check("x", x, weight.shape[1], weight, lora_A, lora_B, dropout_p, seed)
    (m, _), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    if m == 0:
        return x.new_empty((0, n)), x.new_empty((0, r))
    with launch.on_device(x):
        S = down_projection(x, lora_A, 1.0 / (1.0 - dropout_p), dropout_p, seed)
        y = rank_r_gemm(x, weight.t(), S, lora_B.t(), bias, float(scaling))
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

    Returns: dx [M, K] in dy's dtype; dA, dB, dbias in the dtypes of A, B and bias, each rounded once, from
    fp32 sums.
    """
    _check("dy", dy, weight.shape[0], weight, lora_A, lora_B, dropout_p, seed)
    (m, n), k, r = dy.shape, weight.shape[1], lora_A.shape[0]
    if S.shape != (m, r) or S.dtype != dy.dtype:
        raise ValueError(f"expected S {[m, r]} in {dy.dtype}, got {list(S.shape)} in {S.dtype}")
    if need_A and (x is None or x.shape != (m, k) or x.dtype != dy.dtype):
        found = "None" if x is None else f"{list(x.shape)} in {x.dtype}"
        raise ValueError(f"dA needs x {[m, k]} in {dy.dtype}, got {found}")
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
        dS, dB, dbias = _reduce_dy(
            dy, lora_B, S, float(scaling), need_S=need_x or need_A, need_B=need_B, sum_dtype=sum_dtype
        )
        dA = None
        if need_A and x is not None and dS is not None:
            dA, _ = grad_a(x, dS, keep_scale, dropout_p, seed, dtype=lora_A.dtype)
        dx = None
        if need_x and dS is not None:
            dx = rank_r_gemm(dy, weight, dS, lora_A, None, keep_scale, dropout_p, seed)
    return dx, dA, dB, dbias


def _reduce_dy(
    dy: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    *,
    need_S: bool,
    need_B: bool,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(dS, dB, dbias)`: one read of dY when r is small and both products are wanted, else one for each."""
    if need_S and need_B and lora_B.shape[1] <= MAX_RANK:
        return grad_s_b(dy, lora_B, S, scaling, dtype=lora_B.dtype, bias_dtype=sum_dtype)
    dS = down_projection(dy, lora_B.t(), scaling, 0.0, None) if need_S else None
    if need_B:
        dB, dbias = grad_a(
            dy, S, scaling, 0.0, None, dtype=lora_B.dtype, columns_first=True, sum_dtype=sum_dtype
        )
        return dS, dB, dbias
    # Without dB there is no kernel of ours whose read of dY the bias could share.
    dbias = dy.sum(0, dtype=torch.float32).to(sum_dtype) if sum_dtype is not None else None
    return dS, None, dbias
