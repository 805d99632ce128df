"""LoRA and DoRA for a few tokens of 16 bits on a CPU (decoding), where the time is that of the calls.

A 16-bit product costs oneDNN 20 us to begin, an fp32 one 3 (measured, 16 x 1024 by 1024 x 16), and the
masters of fp32 adapters need no cast. So everything but the products with W is in fp32, on tensors too small
to matter, with the factors inside the products, and nothing but y and dx is rounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.dropout import keep, keep_bits, keep_scale
from fastpeft.ops.products import Dropout, Forward, Gradients, Need, RowScale

# At 32 tokens the rank-r products of a 1024 x 1024 layer take 8 us more in fp32 than in 16 bits, and their
# calls 40 us less.
MAX_TOKENS = 32


def serves(x: Tensor) -> bool:
    """Whether x [tokens, features] is a case for this module."""
    return x.is_cpu and x.shape[0] <= MAX_TOKENS and x.element_size() == 2


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout | None,
    scale: RowScale | None,
    keep_z: bool,
) -> Forward:
    """x is [tokens, in_features] in 16 bits, ``scale`` DoRA's; the rest is as the ops take it."""
    kept32 = _kept(x, dropout)
    S = kept32 @ lora_A.float().t()
    Bt = lora_B.float().t()
    if scale is None:
        y = F.linear(x, weight, bias).float().addmm_(S, Bt, alpha=scaling)
        return Forward(y=y.to(x.dtype), S=S.to(x.dtype))
    z = y = (x @ weight.t()).float().addmm_(S, Bt, alpha=scaling)
    if dropout is not None and dropout.on_base:
        z = (kept32.to(x.dtype) @ weight.t()).float().addmm_(S, Bt, alpha=scaling)
        y.addcmul_(z, scale.c - 1.0)
    else:
        y = z * scale.c
    if bias is not None:
        y.add_(bias)
    return Forward(y=y.to(x.dtype), S=S.to(x.dtype), z=z.to(x.dtype) if keep_z else None)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout: Dropout | None,
    need: Need,
    scale: RowScale | None,
    kept: Tensor | None,
) -> Gradients:
    """dy and kept (for ``need.dot``) are [tokens, out_features]."""
    result = Gradients()
    dy32 = dy.float()
    g32 = dy32 if scale is None else dy32 * scale.c
    S32, B32 = S.float(), lora_B.float()
    if need.x or need.A:
        dS = g32 @ B32  # the scaling is a factor of what is made of it, which costs no pass
    if need.x:
        g = dy if scale is None else g32.to(dy.dtype)
        A = lora_A.float()
        if dropout is None:
            dx = (g @ weight).float().addmm_(dS, A, alpha=scaling)
        elif scale is None or not dropout.on_base:
            dx = _kept(dS @ A, dropout).mul_(scaling).add_(g @ weight)
        else:
            # The base product on x has dY's gradient; the one on the dropped x has what c adds to it.
            dropped_part = ((g32 - dy32).to(dy.dtype) @ weight).float().addmm_(dS, A, alpha=scaling)
            dx = _kept(dropped_part, dropout).add_(dy @ weight)
        result.x = dx.to(dy.dtype)
    if need.A:
        assert x is not None
        # beta = 0: lora_A and lora_B stand for their shapes alone.
        result.A = torch.addmm(lora_A.float(), dS.t(), _kept(x, dropout), beta=0, alpha=scaling)
    if need.B:
        result.B = torch.addmm(B32, g32.t(), S32, beta=0, alpha=scaling)
    if need.bias:
        result.bias = dy32.sum(0)
    if need.dot:
        assert kept is not None
        result.dot = (dy32 * kept).sum(0)
    return result


def _kept(x: Tensor, dropout: Dropout | None) -> Tensor:
    """drop(x) in fp32, scaled by 1/(1-p)."""
    x32 = x.float()
    if dropout is None:
        return x32
    return keep(x32, keep_bits(x.shape, dropout.p, dropout.seed, x32)).mul_(keep_scale(dropout.p))
