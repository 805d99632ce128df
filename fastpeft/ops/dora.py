"""DoRA linear (Liu et al. 2024, arXiv 2402.09353), with torch's [out, in] weights a norm per output row.

::

    n = ||W + s B A||_row      c = m / n, detached (section 4.3 of the paper)      s = scaling
    y = c * (x W^T + s (x A^T) B^T) + bias                                          without dropout
    y = x W^T + (c - 1) * (drop(x) W^T) + c * s (drop(x) A^T) B^T + bias            with dropout

The second line is what PEFT and the paper's code compute; it is the first one when nothing is dropped.

The norm is factored (:mod:`fastpeft.ops.row_norm`): no [out_features, in_features] temporary exists.

Backward, with ``g = c * dY`` and ``z = drop(x) W^T + s S B^T``::

    dS = s g B      dB = s g^T S      dA = dS^T drop(x)      dm = colsum(dY * z) / n      dbias = colsum(dY)
    dx = g W + dS A                                             without dropout
    dx = dY W + mask * (((c - 1) * dY) W + dS A)                with dropout

Saved for backward: ``S [tokens, r]``, ``n [out_features]``, references to ``x``, ``weight`` and the adapter,
and one [tokens, out_features] tensor for dm, only where the magnitude trains: the output itself (often alive
anyway), as ``dm = colsum(dY * y) / m``; or z, where there is a bias (``y - bias`` would cancel: Qwen2's
k_proj biases reach hundreds) or dropout.

A row with n = 0 gets c = 0, not NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import backend as backends
from fastpeft.errors import ShapeError
from fastpeft.ops import blocked, native
from fastpeft.ops._common import (
    accumulation_dtype,
    autocast_inputs,
    check_inputs,
    draw_seed,
    flatten_tokens,
    scaled_cast,
    unflatten_tokens,
    without_autocast,
)
from fastpeft.ops.cpu_gemm import products_in_fp32
from fastpeft.ops.features import feature_dot
from fastpeft.ops.products import Dora, Need
from fastpeft.ops.row_norm import row_norm_squared, row_scale


def dora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """The formula with the full [out_features, in_features] update, in whatever dtype it is given."""
    dropped = x if mask is None else x * mask
    norm: Tensor = torch.linalg.vector_norm(weight + scaling * (lora_B @ lora_A), dim=1).detach()
    c = magnitude / norm
    y = x @ weight.T + (c - 1) * (dropped @ weight.T) + c * scaling * ((dropped @ lora_A.T) @ lora_B.T)
    return y if bias is None else y + bias


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    weight_norm_squared: Tensor | None = None,
) -> Tensor:
    """DoRA linear as one differentiable op.

    Args:
        x: ``[..., in_features]``, any strides, zero tokens allowed.
        weight: ``[out_features, in_features]``, any strides, x's dtype.
        bias: ``[out_features]`` or None; outside the row scale.
        lora_A: ``[r, in_features]``, x's dtype or fp32.
        lora_B: ``[out_features, r]``, likewise.
        magnitude: ``[out_features]``, DoRA's m.
        scaling: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA.
        dropout_p: probability of zeroing an element of x in the adapter's part; 0 outside training.
        weight_norm_squared: :func:`row_norm_squared` of the weight, where the caller keeps it.

    Returns:
        ``[..., out_features]`` in x's dtype (in autocast's, where that is on). The output is kept for
        backward, so autograd refuses to have it changed in place.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        BackendError: the backend chosen with :func:`fastpeft.set_backend` cannot run here.
    """
    if weight_norm_squared is None:
        weight_norm_squared = row_norm_squared(weight)  # of the weight itself, not of autocast's copy
    x, weight, bias = autocast_inputs(x, weight, bias)
    check_inputs("dora_linear", x, weight, bias, lora_A, lora_B)
    if magnitude.shape != (weight.shape[0],):
        raise ShapeError(f"dora_linear: expected magnitude [{weight.shape[0]}], got {list(magnitude.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        # The op has no gradient for W (its point is a frozen base): plain autograd has.
        mask = None if dropout_p == 0.0 else F.dropout(torch.ones_like(x), dropout_p)
        A, B, m = lora_A.to(x.dtype), lora_B.to(x.dtype), magnitude.to(x.dtype)
        return dora_linear_reference(x, weight, bias, A, B, m, scaling, mask)
    backend = backends.resolve(x, op="dora_linear", has_triton=False)
    seed = draw_seed(x, dropout_p, backend)
    outputs: tuple[Tensor, ...] = torch.ops.fastpeft.dora_linear(
        x, weight, bias, lora_A, lora_B, magnitude, weight_norm_squared, scaling, dropout_p, seed
    )
    return outputs[0]


def _keeps_product(bias: Tensor | None, seed: Tensor | None) -> bool:
    """Whether dm needs z kept beside y (module docstring)."""
    return bias is not None or seed is not None


@torch.library.custom_op("fastpeft::dora_linear", mutates_args=())
@without_autocast
def _dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    weight_norm_squared: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [..., out_features], S [tokens, r], n [out_features] and z ([0, out_features] if not kept)."""
    tokens = flatten_tokens(x)
    dora = Dora(
        magnitude=magnitude,
        weight_norm_squared=weight_norm_squared,
        keep_z=_keeps_product(bias, seed),
    )
    way = blocked if products_in_fp32(tokens) else native
    result = way.forward(tokens, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, dora)
    assert result.norm is not None
    z = result.y.new_empty(0, weight.shape[0]) if result.z is None else result.z
    return unflatten_tokens(result.y, x.shape), result.S, result.norm, z


@torch.library.custom_op("fastpeft::dora_linear_backward", mutates_args=())
@without_autocast
def _dora_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    S: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need: list[bool],
    bias_dtype: torch.dtype | None,
    has_bias: bool,
) -> list[Tensor]:
    """Return the gradients that ``need`` asks for, out of (x, bias, lora_A, lora_B, magnitude), in order.

    ``kept`` is y, or z where :func:`_keeps_product` says so; x is needed for lora_A's gradient and, without
    dropout or bias, for that of a magnitude which is exactly 0.
    """
    need_x, need_bias, need_A, need_B, need_m = need
    dy2d = flatten_tokens(dy)
    tokens = None if x is None else flatten_tokens(x)
    c = row_scale(magnitude, norm)
    way = blocked if products_in_fp32(dy2d) else native
    result = way.backward(
        dy2d,
        tokens,
        weight,
        lora_A,
        lora_B,
        S,
        scaling,
        dropout_p,
        seed,
        Need(x=need_x, A=need_A, B=need_B, bias=need_bias, dot=need_m),
        c,
        None if kept is None else flatten_tokens(kept),
    )
    gradients: list[Tensor] = []
    if result.x is not None:
        gradients.append(unflatten_tokens(result.x, dy.shape))
    if result.bias is not None:
        gradients.append(result.bias.to(bias_dtype))
    if result.A is not None:
        gradients.append(result.A.to(lora_A.dtype))
    if result.B is not None:
        gradients.append(result.B.to(lora_B.dtype))
    if result.dot is not None:
        inverse_norm = torch.where(norm > 0, 1.0 / norm, 0.0)
        if has_bias or seed is not None:
            dm = result.dot * inverse_norm
        else:
            m = magnitude.to(norm.dtype)
            dm = result.dot / torch.where(m == 0, 1.0, m)
            zero_rows = (m == 0).nonzero().squeeze(1)  # y = 0 there and tells nothing of z: compute z again
            if zero_rows.numel():
                assert tokens is not None
                sB = scaled_cast(lora_B[zero_rows], scaling, dy.dtype)
                z = (tokens @ weight[zero_rows].t()).addmm_(S, sB.t())
                dm[zero_rows] = feature_dot(dy2d[:, zero_rows], z) * inverse_norm[zero_rows]
        gradients.append(dm.to(magnitude.dtype))
    return gradients


@_dora_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    weight_norm_squared: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, out_features = math.prod(x.shape[:-1]), weight.shape[0]
    return (
        x.new_empty(*x.shape[:-1], out_features),
        x.new_empty(tokens, lora_A.shape[0]),
        x.new_empty(out_features, dtype=accumulation_dtype(weight.dtype)),
        x.new_empty(tokens if _keeps_product(bias, seed) else 0, out_features),
    )


@_dora_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    S: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need: list[bool],
    bias_dtype: torch.dtype | None,
    has_bias: bool,
) -> list[Tensor]:
    gradients = [
        dy.new_empty(*dy.shape[:-1], weight.shape[1]),
        dy.new_empty(weight.shape[0], dtype=bias_dtype),
        torch.empty_like(lora_A),
        torch.empty_like(lora_B),
        torch.empty_like(magnitude),
    ]
    return [gradient for gradient, needed in zip(gradients, need, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, lora_A, lora_B, magnitude, _, scaling, dropout_p, seed = inputs
    y, S, norm, z = output
    need_A, need_m = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    keeps_product = _keeps_product(bias, seed)
    kept = (z if keeps_product else y) if need_m else None
    need_x_saved = need_A or (need_m and not keeps_product)
    ctx.save_for_backward(x if need_x_saved else None, kept, weight, lora_A, lora_B, magnitude, S, norm, seed)
    ctx.mark_non_differentiable(S, norm, z)
    ctx.set_materialize_grads(False)
    ctx.options = (scaling, dropout_p, None if bias is None else bias.dtype)


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x_grad, _weight, bias_grad, A_grad, B_grad, m_grad = ctx.needs_input_grad[:6]
    if dy is None:
        return (None,) * 10
    x, kept, weight, lora_A, lora_B, magnitude, S, norm, seed = ctx.saved_tensors
    scaling, dropout_p, bias_dtype = ctx.options
    need = [x_grad, bias_grad, A_grad, B_grad, m_grad]
    gradients = iter(
        torch.ops.fastpeft.dora_linear_backward(
            dy,
            x,
            kept,
            weight,
            lora_A,
            lora_B,
            magnitude,
            S,
            norm,
            scaling,
            dropout_p,
            seed,
            need,
            bias_dtype,
            bias_dtype is not None,
        )
    )
    dx, dbias, dA, dB, dm = (next(gradients) if needed else None for needed in need)
    return dx, None, dbias, dA, dB, dm, None, None, None, None


_dora_linear.register_autograd(_backward, setup_context=_setup_context)
