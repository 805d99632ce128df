"""LoRA linear: ``y = x W^T + bias + scaling * (drop(x) A^T) B^T``  (Hu et al. 2021, arXiv 2106.09685).

Neither ``B A`` nor ``W + scaling B A`` ([out_features, in_features]) is ever formed.

Backward, with ``S = drop(x) A^T`` and ``s = scaling``::

    dS = s dY B        dB = s dY^T S        dA = dS^T drop(x)
    dx = dY W + mask * (dS A)               dbias = colsum(dY)

Saved for backward: ``S [tokens, r]`` and references to ``x`` (only where ``lora_A`` trains), ``weight``,
``lora_A`` and ``lora_B``. No cast copy of ``x`` and no dropout mask: the mask is drawn again from its seed.
Adapters kept in fp32 over a 16-bit base are rounded to the base's dtype for the products, which accumulate
in fp32; their gradients come back in their own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import backend as backends
from fastpeft.ops import kernel_paths, remade
from fastpeft.ops._common import (
    autocast_inputs,
    cast,
    check_inputs,
    flatten_tokens,
    needs_gradients,
    unflatten_tokens,
    without_autocast,
)
from fastpeft.ops.dropout import draw_seeds
from fastpeft.ops.eager import is_transformed, runs_eagerly
from fastpeft.ops.probability import Probability, as_inputs, dropped, from_inputs, is_dropping, number
from fastpeft.ops.products import Dropout, Need
from fastpeft.ops.second_order import differentiable, gradients_of, mask_of, saved_x
from fastpeft.ops.ways import way_for


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> Tensor:
    """The formula, line for line, in whatever dtype it is given; ``mask`` holds 0 or 1/(1-p)."""
    dropped = x if mask is None else x * mask
    return F.linear(x, weight, bias) + scaling * ((dropped @ lora_A.T) @ lora_B.T)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout_p: Probability = 0.0,
) -> Tensor:
    """LoRA linear as one differentiable op.

    Args:
        x: ``[..., in_features]``, any strides, zero tokens allowed.
        weight: ``[out_features, in_features]``, any strides (Conv1D's is a transposed view), x's dtype.
        bias: ``[out_features]`` or None.
        lora_A: ``[r, in_features]``, x's dtype or fp32.
        lora_B: ``[out_features, r]``, likewise.
        scaling: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA.
        dropout_p: probability of zeroing an element of x on its way to ``lora_A``; 0 outside training.

    Returns:
        ``[..., out_features]`` in x's dtype (in autocast's, where that is on).

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        BackendError: the backend chosen with :func:`fastpeft.set_backend` cannot run here.
    """
    x, weight, bias = autocast_inputs(x, weight, bias)
    check_inputs("lora_linear", x, weight, bias, lora_A, lora_B)
    if (weight.requires_grad and torch.is_grad_enabled()) or is_transformed():
        # The op has no gradient for W (its point is a frozen base), plain autograd has.
        mask = dropped(torch.ones_like(x), dropout_p) if is_dropping(dropout_p) else None
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return lora_linear_reference(x, weight, bias, A, B, scaling, mask)
    backend = backends.resolve(x, op="lora_linear")
    seed = draw_seeds(x, [dropout_p], backend)
    if runs_eagerly(x):
        inputs = (x, weight, bias, lora_A, lora_B, scaling)
        options = (number(dropout_p), seed, backend)
        if needs_gradients(x, bias, lora_A, lora_B):
            return _LoRALinear.apply(*inputs, *options)  # type: ignore[no-any-return, no-untyped-call]
        if backend == "triton" and kernel_paths.decodes(x, lora_A, seed):
            return _decode(*inputs)
        return _forward(*inputs, *options)[0]
    ps, live_p = as_inputs([dropout_p])
    y: Tensor = torch.ops.fastpeft.lora_linear(
        x, weight, bias, lora_A, lora_B, scaling, ps, live_p, seed, backend
    )[0]
    return y


@without_autocast
def _decode(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Return y for a few tokens that nobody differentiates."""
    y = kernel_paths.lora_decode(flatten_tokens(x), weight, bias, lora_A, lora_B, scaling)
    return unflatten_tokens(y, x)


@without_autocast
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return y [..., out_features] and S [tokens, r]."""
    tokens = flatten_tokens(x)
    if backend == "triton":
        y, S = kernel_paths.lora_forward(tokens, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    else:
        way = way_for(tokens)
        dropout = None if seed is None else Dropout(p=dropout_p, seed=seed)
        result = way.forward(tokens, weight, bias, lora_A, lora_B, scaling, dropout, None, False)
        y, S = result.y, result.S
    return unflatten_tokens(y, x), S


@without_autocast
def _gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    need: Sequence[bool],
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (x, lora_A, lora_B, bias), None where ``need`` does not ask for it."""
    dy2d = flatten_tokens(dy)
    tokens = None if x is None else flatten_tokens(x)
    need_x, need_A, need_B, need_bias = need
    if backend == "triton":
        dx, dA, dB, dbias = kernel_paths.lora_backward(
            dy2d,
            tokens,
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
    else:
        way = way_for(dy2d, backward=True)
        dropout = None if seed is None else Dropout(p=dropout_p, seed=seed)
        wanted = Need(x=need_x, A=need_A, B=need_B, bias=need_bias)
        result = way.backward(dy2d, tokens, weight, lora_A, lora_B, S, scaling, dropout, wanted, None, None)
        dx = result.x
        dA = None if result.A is None else cast(result.A, lora_A.dtype)
        dB = None if result.B is None else cast(result.B, lora_B.dtype)
        dbias = None if result.bias is None else result.bias.to(bias_dtype)
    if dx is not None:
        dx = unflatten_tokens(dx, dy)
    return dx, dA, dB, dbias


def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    (p,), seed = from_inputs(dropout_p, live_p, seed)
    return _forward(x, weight, bias, lora_A, lora_B, scaling, p, seed, backend)


def _gradients_op(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    backend: str,
    need: list[bool],
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    (p,), seed = from_inputs(dropout_p, live_p, seed)
    found = _gradients(dy, x, weight, lora_A, lora_B, S, scaling, p, seed, backend, need, bias_dtype)
    return [gradient for gradient in found if gradient is not None]


_lora_linear = torch.library.custom_op("fastpeft::lora_linear", _forward_op, mutates_args=())
_lora_linear_backward = torch.library.custom_op(
    "fastpeft::lora_linear_backward", _gradients_op, mutates_args=()
)


@_lora_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tokens = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(tokens, lora_A.shape[0])


@_lora_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    backend: str,
    need: list[bool],
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    gradients = [
        dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need[0] else None,
        torch.empty_like(lora_A) if need[1] else None,
        torch.empty_like(lora_B) if need[2] else None,
        dy.new_empty(weight.shape[0], dtype=bias_dtype) if need[3] else None,
    ]
    return [gradient for gradient in gradients if gradient is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, lora_A, lora_B, scaling, dropout_p, live_p, seed, backend = inputs
    S = output[1]
    x = x if ctx.needs_input_grad[3] else None
    remade.save(ctx, [x, weight, lora_A, lora_B, S, live_p, seed])
    ctx.set_materialize_grads(False)
    ctx.options = (scaling, dropout_p, backend, None if bias is None else bias.dtype)
    ctx.mark_non_differentiable(S)


def _backward(ctx: Any, dy: Tensor | None, _dS: None = None) -> tuple[Tensor | None, ...]:
    x_grad, _, bias_grad, A_grad, B_grad = ctx.needs_input_grad[:5]
    if dy is None:
        return (None,) * 10
    x, weight, lora_A, lora_B, S, live_p, seed = remade.saved(ctx)
    scaling, dropout_p, backend, bias_dtype = ctx.options
    need = [x_grad, A_grad, B_grad, bias_grad]
    inputs = (dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, live_p, seed, backend, need, bias_dtype)
    gradients = iter(torch.ops.fastpeft.lora_linear_backward(*inputs))
    dx, dA, dB, dbias = (next(gradients) if needed else None for needed in need)
    return dx, None, dbias, dA, dB, None, None, None, None, None


_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def _by_reference(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    need_x, _, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
    x, weight, lora_A, lora_B, _S, seed = remade.saved(ctx)
    scaling, p, backend, bias_dtype = ctx.options
    x = saved_x(x, dy, weight.shape[1], (need_A, need_B))
    mask = mask_of(x, p, seed, backend)

    def formula(x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> tuple[Tensor]:
        return (lora_linear_reference(x, weight, bias, A.to(x.dtype), B.to(x.dtype), scaling, mask),)

    bias = weight.new_zeros(weight.shape[0], dtype=bias_dtype) if need_bias else None
    need = (need_x, need_bias, need_A, need_B)
    dx, dbias, dA, dB = gradients_of((dy,), (x, bias, lora_A, lora_B), need, formula)
    return dx, None, dbias, dA, dB, None, None, None, None


class _LoRALinear(torch.autograd.Function):
    """``fastpeft::lora_linear`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        y, S = _forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, backend)
        remade.save(ctx, [x if ctx.needs_input_grad[3] else None, weight, lora_A, lora_B, S, seed])
        ctx.set_materialize_grads(False)
        ctx.options = (scaling, dropout_p, backend, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @differentiable(_by_reference)
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        need_x, _, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        need = (need_x, need_A, need_B, need_bias)
        x, weight, lora_A, lora_B, S, seed = remade.saved(ctx)
        scaling, p, backend, bias_dtype = ctx.options
        tensors = (dy, x, weight, lora_A, lora_B, S)
        if runs_eagerly(dy):
            dx, dA, dB, dbias = _gradients(*tensors, scaling, p, seed, backend, need, bias_dtype)
        else:  # an autograd that is traced
            options = ([p], None, seed, backend, list(need), bias_dtype)
            found = iter(torch.ops.fastpeft.lora_linear_backward(*tensors, scaling, *options))
            dx, dA, dB, dbias = (next(found) if needed else None for needed in need)
        return dx, None, dbias, dA, dB, None, None, None, None
