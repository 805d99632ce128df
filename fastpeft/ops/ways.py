"""Which of the torch backend's ways multiplies: they differ in speed alone."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from fastpeft.ops import blocked, few_tokens, native
from fastpeft.ops.cpu_gemm import products_in_fp32
from fastpeft.ops.products import Dropout, Forward, RowScale


def way_for(tokens: Tensor, *, backward: bool = False) -> ModuleType:
    """Return the module whose ``forward`` (``backward``) serves x (dY), ``tokens`` [tokens, features]."""
    if tokens.element_size() != 2:
        return native
    if products_in_fp32(tokens, backward=backward):
        return blocked
    return few_tokens if few_tokens.serves(tokens) else native


def dora_forward(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout | None,
    scale: RowScale,
    keep_z: bool,
) -> Forward:
    """DoRA's forward by the way that serves ``tokens``.

    While every c is 1 (a fresh adapter, whose m is n), y is LoRA's, its bias inside the base's own product: a
    base with a bias rounds ``x W^T + bias`` otherwise than ``c (x W^T) + bias``, and DoRA's first output is
    to be the base's. What z is kept for then takes a product of its own, in the first step alone.
    """
    way = way_for(tokens)
    adapter = (lora_A, lora_B, scaling, dropout)
    on_base = dropout is not None and dropout.on_base
    if not scale.is_one or bias is None or on_base:
        result: Forward = way.forward(tokens, weight, bias, *adapter, scale, keep_z)
        return result
    y: Forward = way.forward(tokens, weight, bias, *adapter, None, False)
    z: Tensor | None = way.forward(tokens, weight, None, *adapter, None, False).y if keep_z else None
    return y._replace(z=z)
