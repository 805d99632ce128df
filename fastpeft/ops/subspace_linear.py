"""A linear with ``W = W_0 + P theta_d``.

    y = x (W_0 + P phi)^T + b_0 + P' phi         dphi = P^T (dY^T x) + P'^T colsum(dY)

Saved for backward: references to x, W_0 and phi; never W, which is computed again. One tensor of the weight's
size lives at a time: W in the forward, in the backward dW, which is projected chunk by chunk while W takes
its place. So a step needs the weights, x of each linear (as full fine-tuning does), and one layer more; no
gradient and no moment of D numbers. Its products are full fine-tuning's three, and three projections of the
weights' size come on top: P phi in both directions, P^T dW in the backward, with the randomness drawn twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.errors import ShapeError
from fastpeft.ops._common import autocast_is_on, flatten_tokens, unflatten_tokens, without_autocast
from fastpeft.ops.eager import is_transformed, runs_eagerly
from fastpeft.ops.features import feature_sum
from fastpeft.ops.second_order import differentiable
from fastpeft.ops.subspace import Projection, add_projected, projected_gradient
from fastpeft.ops.subspace_weight import check, for_op, subspace_weight_reference


def subspace_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phi: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: list[int],
    *,
    transposed: bool = False,
) -> Tensor:
    """Return ``x (W_0 + P phi)^T + b``, in x's dtype or, under autocast, in autocast's.

    Args:
        x: [..., in_features].
        weight: W_0 [out_features, in_features]; frozen.
        bias: b_0 [out_features], or None.
        phi: [n], fp32 or fp64.
        tables: of :func:`fastpeft.ops.subspace.tables`.
        spec: of :meth:`fastpeft.ops.subspace.Projection.spec`.
        first: the first blocks of the weight and of the bias; -1 for one that stays as it is.
        transposed: whether W_0 is [in_features, out_features], as of a Conv1D.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
    """
    check("subspace_linear", weight, phi, spec)
    inside = weight.shape[0 if transposed else 1]
    if weight.dim() != 2 or x.shape[-1] != inside:
        raise ShapeError(
            f"subspace_linear: expected x [..., {inside}] for a weight {list(weight.shape)}, "
            f"got {list(x.shape)}"
        )
    if autocast_is_on(x) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        raise ShapeError(f"subspace_linear: expected x in the weight's dtype {weight.dtype}, got {x.dtype}")
    if is_transformed():
        W, b = (
            t if t is None or at < 0 else subspace_weight_reference(t, phi, tables, spec, at)
            for t, at in zip((weight, bias), first, strict=True)
        )
        assert W is not None
        return F.linear(x, W.t() if transposed else W, b)
    inputs = (x, weight, bias, phi, tables, spec, first, transposed)
    if runs_eagerly(x):
        return _Linear.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.fastpeft.subspace_linear(*inputs)  # type: ignore[no-any-return]


@without_autocast
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phi: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: list[int],
    transposed: bool,
) -> Tensor:
    projection = Projection.from_spec(spec)
    W, b = (
        t
        if t is None
        else add_projected(projection, t, phi, tables, at, x.dtype)
        if at >= 0
        else t.to(x.dtype)
        for t, at in zip((weight, bias), first, strict=True)
    )
    assert W is not None
    return F.linear(x, W.t() if transposed else W, b)


@without_autocast
def _linear_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    phi: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: list[int],
    transposed: bool,
    need: list[bool],
) -> list[Tensor]:
    """Return the gradients that ``need`` asks for, of (x, phi), in that order."""
    projection, (at, bias_at) = Projection.from_spec(spec), first
    need_x, need_phi = need
    gradient, tokens = flatten_tokens(dy), flatten_tokens(x)
    found: list[Tensor] = []
    dphi = torch.zeros_like(phi) if need_phi else None
    W: Tensor | None = None
    if dphi is not None and at >= 0:
        dW = tokens.t() @ gradient if transposed else gradient.t() @ tokens
        if need_x:
            dphi += projected_gradient(projection, dW, tables, at, refill=(weight, phi))
            W = dW  # no more a gradient: its memory has been filled up again
        else:
            dphi += projected_gradient(projection, dW, tables, at)
        del dW
    if dphi is not None and bias_at >= 0:
        dphi += projected_gradient(projection, feature_sum(gradient), tables, bias_at)
    if need_x:
        if W is None:
            W = (
                weight.to(dy.dtype)
                if at < 0
                else add_projected(projection, weight, phi, tables, at, dy.dtype)
            )
        found.append(unflatten_tokens(gradient @ (W.t() if transposed else W), x))
    return found if dphi is None else [*found, dphi]


_linear_op = torch.library.custom_op("fastpeft::subspace_linear", _linear, mutates_args=())
_linear_back = torch.library.custom_op(
    "fastpeft::subspace_linear_backward", _linear_gradients, mutates_args=()
)


@_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phi: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: list[int],
    transposed: bool,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if transposed else 0])


@_linear_back.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    phi: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: list[int],
    transposed: bool,
    need: list[bool],
) -> list[Tensor]:
    found = [dy.new_empty(x.shape), torch.empty_like(phi)]
    return [tensor for tensor, needed in zip(found, need, strict=True) if needed]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, phi, *ctx.options = inputs
    ctx.save_for_backward(x, weight, phi)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
    run = _linear_gradients if runs_eagerly(dy) else torch.ops.fastpeft.subspace_linear_backward
    x, weight, phi = ctx.saved_tensors
    tables, spec, first, transposed = ctx.options
    found = iter(run(dy, x, weight, phi, tables, spec, first, transposed, need))
    dx, dphi = (next(found) if needed else None for needed in need)
    return dx, None, None, dphi, None, None, None, None


_linear_op.register_autograd(for_op(_linear_backward, 4), setup_context=_save_linear)


class _Linear(torch.autograd.Function):
    """``fastpeft::subspace_linear`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_linear(ctx, inputs, inputs[0])
        return _linear(*inputs)

    @staticmethod
    @differentiable()
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _linear_backward(ctx, dy)
