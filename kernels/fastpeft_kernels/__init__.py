"""Triton kernels of fastpeft: torch tensors in, torch tensors out; no autograd, no modules.

Importing this package never imports Triton, so that a machine without it can still import `fastpeft`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["is_available", "lora_backward", "lora_forward"]


def is_available() -> bool:
    """Whether Triton can be imported; says nothing about a GPU being present."""
    return importlib.util.find_spec("triton") is not None


def _require_triton() -> None:
    if not is_available():
        raise ImportError(
            "the triton kernels need Triton, which is not installed: pip install fastpeft[triton]"
        )


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
    """`S = drop(x) A^T`, `y = x W^T + scaling * S B^T + bias`; returns `(y, S)`. See `lora.lora_forward`."""
    _require_triton()
    from . import lora

    return lora.lora_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


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
    """Gradients `(dx, dA, dB, dbias)`, each computed only when asked for. See `lora.lora_backward`."""
    _require_triton()
    from . import lora

    return lora.lora_backward(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        S,
        scaling,
        dropout_p,
        seed,
        need_x=need_x,
        need_A=need_A,
        need_B=need_B,
        need_bias=need_bias,
        bias_dtype=bias_dtype,
    )
