"""LoRA and DoRA in ATen calls on the operands' own dtype, arranged for the fewest passes over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops._common import accumulation_dtype, cast, scaled_cast
from fastpeft.ops.dropout import keep, keep_, keep_bits, keep_scale
from fastpeft.ops.features import feature_dot, feature_sum, scale_features
from fastpeft.ops.products import Dropout, Forward, Gradients, Need, RowScale


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
    """x is [tokens, in_features], ``scale`` DoRA's; everything else is as the ops take it."""
    if scale is not None and scales_weight_forward(x, weight, bias, dropout):
        W, B = scaled_rows(weight, lora_B, scale)
        return forward(x, W, bias, lora_A, B, scaling, dropout, None, False)
    kept, k = x, 1.0
    if dropout is not None:
        kept = keep(x, keep_bits(x.shape, dropout.p, dropout.seed, x))
        k = keep_scale(dropout.p)
    S = kept @ scaled_cast(lora_A, k, x.dtype).t()
    Bt = cast(lora_B, x.dtype).t()
    # In place, so that the rank-r product costs one pass over y and no temporary of its size; the scaling is
    # the GEMM's own factor, applied in fp32.
    if scale is None:
        return Forward(y=F.linear(x, weight, bias).addmm_(S, Bt, alpha=scaling), S=S)
    if dropout is not None and dropout.on_base:
        z = (kept @ weight.t()).addmm_(S, Bt, beta=k, alpha=scaling)
        y = F.linear(x, weight, bias).addmm_(S, Bt, alpha=scaling).addcmul_(z, (scale.c - 1.0).to(z.dtype))
    else:
        z = (x @ weight.t()).addmm_(S, Bt, alpha=scaling)
        y = scale_features(z, scale, out=None if keep_z else z)
        if bias is not None:
            y.add_(bias)
    return Forward(y=y, S=S, z=z if keep_z else None)


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
    if scale is not None and scales_weight(dy, weight, dropout):
        W, B = scaled_rows(weight, lora_B, scale)
        result = backward(dy, x, W, lora_A, B, S, scaling, dropout, need, None, kept)
        if result.B is not None:
            result.B.mul_(scale.c[:, None])
        return result
    result = Gradients()
    bits, k = None, 1.0
    if dropout is not None and (need.x or need.A):
        bits = keep_bits((dy.shape[0], weight.shape[1]), dropout.p, dropout.seed, dy)
        k = keep_scale(dropout.p)
    if need.x or need.A or need.B:
        g = dy if scale is None else scale_features(dy, scale)
    left = 1.0  # of the scaling, which wide products take on later: a factor of theirs costs nothing
    if need.x or need.A:
        if g.dtype is lora_B.dtype and g.dtype is accumulation_dtype(g.dtype):
            dS, left = g @ lora_B, scaling
        else:
            dS = g @ scaled_cast(lora_B, scaling, g.dtype)
    if need.x:
        A = cast(lora_A, dy.dtype)
        if bits is None:
            result.x = (g @ weight).addmm_(dS, A, alpha=left)
        elif scale is None or (dropout is not None and not dropout.on_base):
            result.x = (g @ weight).add_(keep_(dS @ A, bits), alpha=k * left)
        else:
            # The base product on x has dY's gradient; the one on the dropped x has what c adds to it.
            dropped_part = ((dy * (scale.c - 1.0).to(dy.dtype)) @ weight).addmm_(dS, A, alpha=left)
            result.x = (dy @ weight).add_(keep_(dropped_part, bits), alpha=k)
    if need.A:
        assert x is not None
        result.A = _scaled_product(dS.t(), x if bits is None else keep(x, bits), k * left, lora_A)
    if need.B:
        result.B = _grad_lora_b(g, S, scaling, lora_B)
    if need.bias:
        result.bias = feature_sum(dy)
    if need.dot:
        assert kept is not None
        result.dot = feature_dot(dy, kept)
    return result


def scales_weight(tokens: Tensor, weight: Tensor, dropout: Dropout | None = None) -> bool:
    """Whether c is to scale the rows of W and B, DoRA being LoRA on them then, instead of y or dY.

    It is as exact, and a pass over the smaller of two tensors, which is worth those over the factors from 1.5
    tokens for each of in_features. A DoRA call, both ways, then took of the time without: at 2048 x 1024 x
    4096, r=16, 0.89 in bf16 and 0.94 in fp32; at 1024 x 1024 x 1024, where it is not done, 1.07 and 1.01.
    """
    on_base = dropout is not None and dropout.on_base
    # In fp16, c W could be too small and S^T dY, which c comes to later, too large.
    is_fit = tokens.is_cpu and tokens.dtype is not torch.float16 and not on_base
    return is_fit and 2 * tokens.shape[0] >= 3 * weight.shape[1]


def scales_weight_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dropout: Dropout | None = None
) -> bool:
    """:func:`scales_weight` in a forward: not where training keeps z, whose y is to have the same bits."""
    return bias is None and scales_weight(x, weight, dropout)


def scaled_rows(weight: Tensor, lora_B: Tensor, scale: RowScale) -> tuple[Tensor, Tensor]:
    """Return ``c W`` in W's dtype and ``c B`` in fp32 (fp64)."""
    return scale_features(weight.t(), scale).t(), lora_B * scale.c[:, None]


def _scaled_product(a: Tensor, b: Tensor, scaling: float, like: Tensor) -> Tensor:
    """Return ``scaling * a @ b`` in fp32 (fp64), ``like`` a tensor of its shape.

    In fp32 the factor is the product's own: a pass over the result would be another call, which for a few
    tokens is what takes time. ``like`` stands where a product adds to something, and is not read.
    """
    dtype = accumulation_dtype(a.dtype)
    if scaling != 1.0 and a.dtype is dtype and like.dtype is dtype:
        return torch.addmm(like, a, b, beta=0, alpha=scaling)
    return scaled_cast(a @ b, scaling, dtype)


def _grad_lora_b(g: Tensor, S: Tensor, scaling: float, lora_B: Tensor) -> Tensor:
    """Return ``scaling * g^T S`` [out_features, r] in fp32 (fp64)."""
    dtype = accumulation_dtype(g.dtype)
    if g.dtype is dtype:
        return _scaled_product(g.t(), S, scaling, lora_B)
    if S.shape[1] > 16:
        return scaled_cast(g.t() @ S, scaling, dtype)
    # The wide matrix on the right, which oneDNN packs faster: at 2048 x 4096 and r = 16, 1.1 ms with the
    # transposition against 1.4. From r = 32 on the transposition costs more than that saves.
    dB = torch.empty(g.shape[1], S.shape[1], dtype=dtype, device=g.device)
    return dB.copy_((S.t() @ g).t()).mul_(scaling)
