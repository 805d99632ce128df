"""LoRA with a LayerNorm between its matrices: ``y = base + s LN(x A^T) B^T``.

``LN(h) = (h - mean(h)) / sqrt(var(h) + eps) * g + b`` over the r features of a token, with g and b trained
(LayerNorm: arXiv 1607.06450). Normalising ``A x`` is the form that NoRA (arXiv 2608.31036) starts from, after
the latent normalisation of multi-head latent attention (arXiv 2405.04434). The update is not linear in x, so
no weight can hold it.

Backward, with ``h = x A^T`` and ``n = LN(h)``::

    dn = s dY B      dB = s dY^T n      dg = colsum(dn * (n - b) / g)      db = colsum(dn)
    dh = dLN(dn)     dA = dh^T x        dx = dh A                          dbase = dY

Saved for backward: references to ``x`` (only where A trains), A, B, g and b; ``h`` [tokens, r], and its mean
and inverse deviation [tokens, 1]. The norm is computed in fp32 (fp64), whatever x is in. Parameters in fp32
over a 16-bit base are rounded to its dtype for the products, as LoRA's are; gradients come back in their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.errors import ShapeError
from fastpeft.ops._common import (
    accumulation_dtype,
    flatten_tokens,
    scaled_cast,
    unflatten_tokens,
    without_autocast,
)
from fastpeft.ops.eager import is_transformed, runs_eagerly
from fastpeft.ops.second_order import differentiable

EPS = 1e-5  # torch.nn.LayerNorm's
_aten = torch.ops.aten


def ln_lora_reference(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """The formula, line for line, in whatever dtype it is given."""
    h = F.linear(x, lora_A)
    n = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, EPS)
    return base + scaling * F.linear(n, lora_B)


def ln_lora(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
) -> Tensor:
    """An LN-LoRA adapter's result as one differentiable op.

    Args:
        base: ``[..., out_features]``, the linear's output.
        x: ``[..., in_features]``, its input, in base's dtype or, under autocast, another.
        lora_A: ``[r, in_features]`` with r of at least 2, base's dtype or fp32.
        norm_weight: ``[r]``, the LayerNorm's, in lora_A's dtype.
        norm_bias: ``[r]``, likewise.
        lora_B: ``[out_features, r]``, likewise.
        scaling: the factor on what is added.

    Returns:
        ``[..., out_features]`` in base's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
    """
    if x.dtype != base.dtype:
        x = x.to(base.dtype)
    _check(base, x, lora_A, norm_weight, norm_bias, lora_B)
    inputs = (base, x, lora_A, norm_weight, norm_bias, lora_B, scaling)
    if is_transformed():
        A, g, b, B = (tensor.to(base.dtype) for tensor in (lora_A, norm_weight, norm_bias, lora_B))
        return ln_lora_reference(base, x, A, g, b, B, scaling)
    if runs_eagerly(base):
        return _LNLoRA.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    y, *_ = torch.ops.fastpeft.ln_lora(*inputs)
    return y  # type: ignore[no-any-return]


def _check(
    base: Tensor, x: Tensor, lora_A: Tensor, norm_weight: Tensor, norm_bias: Tensor, lora_B: Tensor
) -> None:
    parameters = (lora_A, norm_weight, norm_bias, lora_B)
    r = lora_A.shape[0]
    expected = [[r, x.shape[-1]], [r], [r], [base.shape[-1], r]]
    found = [list(tensor.shape) for tensor in parameters]
    if expected != found or r < 2 or x.shape[:-1] != base.shape[:-1]:
        raise ShapeError(
            "ln_lora: expected x with base's leading sizes, lora_A [r, in_features] with r of at least 2, "
            f"norm_weight [r], norm_bias [r] and lora_B [out_features, r], got x {list(x.shape)}, base "
            f"{list(base.shape)} and {', '.join(map(str, found))}"
        )
    if len({tensor.dtype for tensor in parameters}) > 1:
        kinds = ", ".join(str(tensor.dtype) for tensor in parameters)
        raise ShapeError(f"ln_lora: expected parameters of one dtype, got {kinds}")
    if len({tensor.device for tensor in (base, x, *parameters)}) > 1:
        raise ShapeError(f"ln_lora: expected all tensors on one device, got {base.device}, {lora_A.device}")


def _normalised(h: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return LN(h) [tokens, r], mean and inverse deviation [tokens, 1], in fp32 (fp64)."""
    kind = accumulation_dtype(h.dtype)
    found: tuple[Tensor, Tensor, Tensor] = _aten.native_layer_norm(
        h.to(kind), h.shape[-1:], norm_weight.to(kind), norm_bias.to(kind), EPS
    )
    return found


@without_autocast
def _forward(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [..., out_features] and what is kept: h [tokens, r], mean and deviation^-1 [tokens, 1]."""
    dtype = base.dtype
    h = flatten_tokens(x) @ lora_A.to(dtype).t()
    n, mean, rstd = _normalised(h, norm_weight, norm_bias)
    y = torch.addmm(flatten_tokens(base), n.to(dtype), lora_B.to(dtype).t(), alpha=scaling)
    return unflatten_tokens(y, base), h, mean, rstd


@without_autocast
def _gradients(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lora_B: Tensor,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scaling: float,
    need: list[bool],
) -> list[Tensor]:
    """Return the gradients that ``need`` asks for, of (x, lora_A, norm_weight, norm_bias, lora_B)."""
    need_x, need_A, need_weight, need_bias, need_B = need
    gradient = flatten_tokens(dy)
    kind = accumulation_dtype(dy.dtype)
    results: dict[int, Tensor] = {}
    if need_B:
        n, _, _ = _normalised(h, norm_weight, norm_bias)
        results[4] = scaled_cast(gradient.t() @ n.to(dy.dtype), scaling, lora_B.dtype)
    if need_x or need_A or need_weight or need_bias:
        dn = gradient @ scaled_cast(lora_B, scaling, dy.dtype)
        dh, dweight, dbias = _aten.native_layer_norm_backward(
            dn.to(kind),
            h.to(kind),
            h.shape[-1:],
            mean,
            rstd,
            norm_weight.to(kind),
            norm_bias.to(kind),
            [need_x or need_A, need_weight, need_bias],
        )
        if need_x or need_A:
            dh = dh.to(dy.dtype)
        if need_x:
            results[0] = unflatten_tokens(dh @ lora_A.to(dy.dtype), dy)
        if need_A:
            assert x is not None
            results[1] = (dh.t() @ flatten_tokens(x)).to(lora_A.dtype)
        if need_weight:
            results[2] = dweight.to(norm_weight.dtype)
        if need_bias:
            results[3] = dbias.to(norm_bias.dtype)
    return [results[place] for place in sorted(results)]


_ln_lora = torch.library.custom_op("fastpeft::ln_lora", _forward, mutates_args=())
_ln_lora_backward = torch.library.custom_op("fastpeft::ln_lora_backward", _gradients, mutates_args=())


@_ln_lora.register_fake
def _(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = math.prod(base.shape[:-1])
    statistics = [base.new_empty(tokens, 1, dtype=accumulation_dtype(base.dtype)) for _ in range(2)]
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    return y, base.new_empty(tokens, lora_A.shape[0]), statistics[0], statistics[1]


@_ln_lora_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    lora_B: Tensor,
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scaling: float,
    need: list[bool],
) -> list[Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], lora_A.shape[1]))
    every = [dx, *(torch.empty_like(p) for p in (lora_A, norm_weight, norm_bias, lora_B))]
    return [tensor for tensor, needed in zip(every, need, strict=True) if needed]


def _save(ctx: Any, inputs: tuple[Any, ...], kept: tuple[Tensor, ...]) -> None:
    _, x, *parameters, scaling = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, *parameters, *kept)
    ctx.set_materialize_grads(False)
    ctx.scaling = scaling


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dy: Tensor | None, *_kept: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    base_grad, *need = ctx.needs_input_grad[:6]
    gradients_of = _gradients if runs_eagerly(dy) else torch.ops.fastpeft.ln_lora_backward
    x, A, g, b, B, h, mean, rstd = ctx.saved_tensors
    found = iter(gradients_of(dy, x, A, g, b, B, h, mean, rstd, ctx.scaling, need))
    return (dy if base_grad else None, *(next(found) if needed else None for needed in need), None)


_ln_lora.register_autograd(_backward, setup_context=_setup_context)


class _LNLoRA(torch.autograd.Function):
    """``fastpeft::ln_lora`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, *kept = _forward(*inputs)
        _save(ctx, inputs, tuple(kept))
        return y

    @staticmethod
    @differentiable()
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy)
