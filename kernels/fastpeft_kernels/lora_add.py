"""LoRA's update on a base product that is already there, and its gradients.

    S = drop(x) A^T                              down_projection   one read of x
    y = y + s S B^T                              expand_scale_     one read and one write of y, in place
    dS = s dY B,  dB = s dY^T S                  reduce_dy         one read of dY
    dA = dS^T drop(x)                            grad_a            one read of x
    dx = mask * (dS A) / (1 - p)                 expand_add_       one write, one read and one write of dx

For bases with a product of their own, quantised ones above all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .down_projection import down_projection
from .expand import expand_add_, expand_scale_
from .grad_a import grad_a
from .reduce_dy import reduce_dy


def lora_add_(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = y + scaling * S B^T` in place.

    Args:
        y: [M, N], contiguous; fp32, fp16 or bf16.
        x: [M, K] in y's dtype, any strides.
        lora_A: [r, K], in x's dtype or fp32; converted to x's dtype in registers.
        lora_B: [N, r], as lora_A.
        scaling: a run-time number, applied in fp32.
        dropout_p: probability of dropping an element of x in front of A, in [0, 1).
        seed: one int64 on x's device, read by the kernels; required when dropout_p > 0.

    Returns:
        y and S [M, r], in x's dtype. S is unscaled; backward wants it as it is.
    """
    if x.shape[0] == 0:
        return y, x.new_empty((0, lora_A.shape[0]))
    with launch.on_device(x):
        S = down_projection(x, lora_A, 1.0 / (1.0 - dropout_p), dropout_p, seed)
        return expand_scale_(y, S, lora_B, float(scaling)), S


def lora_add_backward(
    dy: Tensor,
    x: Tensor | None,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients `(dx, dA, dB)` of `lora_add_`; what is not asked for is None and costs nothing.

    Args:
        dy: [M, N], any strides (an expanded gradient included).
        x: [M, K] as in forward; None is fine when need_A is false.
        lora_A: as in forward, like lora_B, scaling, dropout_p and seed, which give the same mask again.
        lora_B: as in forward.
        S: [M, r] from forward.
        scaling: as in forward.
        dropout_p: as in forward.
        seed: as in forward.
        need_x: whether dx, the adapter's share of x's gradient, is wanted; the other flags likewise.
        need_A: whether dA is wanted.
        need_B: whether dB is wanted.

    Returns: dx [M, K] in dy's dtype; dA and dB in the dtypes of A and B, each rounded once, from fp32 sums.
    """
    if need_A and x is None:
        raise ValueError("dA needs x")
    m, k = dy.shape[0], lora_A.shape[1]
    if m == 0:
        return (
            dy.new_empty((0, k)) if need_x else None,
            torch.zeros_like(lora_A, memory_format=torch.contiguous_format) if need_A else None,
            torch.zeros_like(lora_B, memory_format=torch.contiguous_format) if need_B else None,
        )
    keep_scale = 1.0 / (1.0 - dropout_p)
    dA = dx = None
    with launch.on_device(dy):
        dS, dB, _, _ = reduce_dy(
            dy, lora_B, S, float(scaling), need_S=need_x or need_A, need_B=need_B, bias_dtype=None
        )
        if need_A and x is not None and dS is not None:
            dA, _, _ = grad_a(x, dS, keep_scale, dropout_p, seed, dtype=lora_A.dtype)
        if need_x and dS is not None:
            dx = expand_add_(dy.new_zeros((m, k)), dS, lora_A, keep_scale, dropout_p, seed)
    return dx, dA, dB
