"""LoRA and DoRA in ATen calls on the operands' own dtype, arranged for the fewest passes over memory."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops._common import accumulation_dtype, dropout_mask, scaled_cast
from fastpeft.ops.features import feature_dot, scale_features
from fastpeft.ops.products import Dora, Forward, Gradients, Need
from fastpeft.ops.row_norm import row_norm, row_scale


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    dora: Dora | None,
) -> Forward:
    """x is [tokens, in_features]; everything else is as the ops take it."""
    dropped = x if seed is None else x * dropout_mask(x, dropout_p, seed)
    S = dropped @ lora_A.to(x.dtype).t()
    sB = scaled_cast(lora_B, scaling, x.dtype)
    # In place, so that the rank-r product costs one pass over y and no [tokens, out_features] temporary.
    if dora is None:
        return Forward(y=F.linear(x, weight, bias).addmm_(S, sB.t()), S=S)
    norm = row_norm(weight, lora_A, lora_B, scaling, dora.weight_norm_squared)
    c = row_scale(dora.magnitude, norm)
    z = (dropped @ weight.t()).addmm_(S, sB.t())
    if seed is not None:
        y = F.linear(x, weight, bias).addmm_(S, sB.t()).addcmul_(z, (c - 1.0).to(z.dtype))
    else:
        y = scale_features(z, c, out=None if dora.keep_z else z)
        if bias is not None:
            y.add_(bias)
    return Forward(y=y, S=S, norm=norm, z=z if dora.keep_z else None)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need: Need,
    c: Tensor | None,
    kept: Tensor | None,
) -> Gradients:
    """dy and kept (for ``need.dot``) are [tokens, out_features], ``c`` is DoRA's row scale."""
    result = Gradients()
    mask = None
    if seed is not None and (need.x or need.A):
        mask = dropout_mask(dy.new_empty(()).expand(dy.shape[0], weight.shape[1]), dropout_p, seed)
    if need.x or need.A or need.B:
        g = dy if c is None else scale_features(dy, c)
    if need.x or need.A:
        dS = g @ scaled_cast(lora_B, scaling, dy.dtype)
    if need.x:
        A = lora_A.to(dy.dtype)
        if mask is None:
            result.x = (g @ weight).addmm_(dS, A)
        elif c is None:
            result.x = (dy @ weight).addcmul_(dS @ A, mask)
        else:
            # The base product on x has dY's gradient; the one on the dropped x has what c adds to it.
            dropped_part = ((dy * (c - 1.0).to(dy.dtype)) @ weight).addmm_(dS, A)
            result.x = (dy @ weight).addcmul_(dropped_part, mask)
    if need.A:
        assert x is not None
        result.A = dS.t() @ (x if mask is None else x * mask)
    if need.B:
        result.B = scaled_cast(g.t() @ S, scaling, accumulation_dtype(dy.dtype))
    if need.bias:
        result.bias = dy.sum(0, dtype=accumulation_dtype(dy.dtype))
    if need.dot:
        assert kept is not None
        result.dot = feature_dot(dy, kept)
    return result
