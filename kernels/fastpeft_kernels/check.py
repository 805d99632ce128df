"""Checks of arguments: the kernels trust shapes and dtypes, and a wrong one would read out of bounds."""

from __future__ import annotations

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_operands(
    name: str,
    wide: Tensor,
    width: int,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    dropout_p: float,
    seed: object,
) -> None:
    """Refuse a linear's operands that do not fit together; `wide` is x or dy, [M, width]."""
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


def check_backward(dy: Tensor, x: Tensor | None, weight: Tensor, S: Tensor) -> None:
    """Refuse an S, or an x where one is given, that does not go with dy [M, N]."""
    m, k = dy.shape[0], weight.shape[1]
    if S.dim() != 2 or S.shape[0] != m or S.dtype != dy.dtype:
        raise ValueError(f"expected S [{m}, r] in {dy.dtype}, got {list(S.shape)} in {S.dtype}")
    if x is not None and (x.shape != (m, k) or x.dtype != dy.dtype):
        raise ValueError(f"dA needs x {[m, k]} in {dy.dtype}, got {list(x.shape)} in {x.dtype}")


def check_row_scale(weight: Tensor, magnitude: Tensor, norm: Tensor) -> None:
    """Refuse a magnitude or a norm that does not go with the weight's rows."""
    n = weight.shape[0]
    if magnitude.shape != (n,) or norm.shape != (n,):
        raise ValueError(
            f"expected magnitude and norm [{n}], got {list(magnitude.shape)} and {list(norm.shape)}"
        )
    if norm.dtype != torch.float32 or not norm.is_contiguous() or not magnitude.is_floating_point():
        raise TypeError(
            f"expected a floating magnitude and a contiguous float32 norm, got {magnitude.dtype} and "
            f"{norm.dtype}, strides {norm.stride()}"
        )
