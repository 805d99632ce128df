"""What layers compute with ``W = W_0 + P theta_d``: the weight, a linear's product, an embedding's rows.

    weight      W_0 + P phi
    linear      y = x (W_0 + P phi)^T + b_0 + P' phi         dphi = P^T (dY^T x) + P'^T colsum(dY)
    embedding   y_t = (W_0 + P phi)[id_t]                    dphi = sum_t P_{id_t}^T dY_t

Saved for backward: references to x (ids), W_0 and phi; never W, which is computed again. Of a linear one
    tensor of
its weight's size lives at a time: W in the forward, in the backward dW, which is projected chunk by chunk
while W takes its place. So a step needs the weights, x of each linear (as full fine-tuning does), and one
layer more; no gradient and no moment of D numbers. Its products are full fine-tuning's three, and three
projections of the weights' size come on top: P phi in both directions, P^T dW in the backward, with the
randomness drawn twice.

phi [n] is fp32 (fp64) whatever the weights are; their sum is rounded once, to the dtype of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.errors import ShapeError
from fastpeft.ops._common import autocast_is_on, flatten_tokens, unflatten_tokens, without_autocast
from fastpeft.ops.eager import differentiable_once, is_transformed, runs_eagerly
from fastpeft.ops.features import feature_sum
from fastpeft.ops.subspace import Projection, add_projected, project, projected_gradient
from fastpeft.ops.subspace_rows import is_cheaper, rows_added, rows_gradient


def spec_of(projection: Projection) -> list[int]:
    """Return the projection as custom ops take it: (is_fastfood, d, seed, total)."""
    return [int(projection.is_fastfood), projection.d, projection.seed, projection.total]


def _read(spec: list[int]) -> Projection:
    return Projection(bool(spec[0]), *spec[1:])


def subspace_weight_reference(
    weight: Tensor, phi: Tensor, tables: list[Tensor], spec: list[int], first: int
) -> Tensor:
    """The formula in ATen calls that everything differentiates: all blocks at once."""
    projection = _read(spec)
    blocks = torch.arange(first, first + projection.blocks(weight.numel()), device=weight.device)
    delta = project(projection, phi, blocks, tables).reshape(-1)[: weight.numel()].view(weight.shape)
    return (weight + delta).to(weight.dtype)


def subspace_weight(weight: Tensor, phi: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    """Return ``W_0 + P phi`` in W_0's dtype.

    Args:
        weight: W_0, of any shape; frozen.
        phi: [n], fp32 or fp64, of :func:`fastpeft.ops.subspace.coordinates`.
        tables: of :func:`fastpeft.ops.subspace.tables`, in phi's dtype.
        spec: of :func:`spec_of`.
        first: the weight's first block.

    Raises:
        ShapeError: phi does not have n elements, or is on another device.
    """
    _check("subspace_weight", weight, phi, spec)
    if is_transformed():
        return subspace_weight_reference(weight, phi, tables, spec, first)
    if runs_eagerly(weight):
        return _Weight.apply(weight, phi, tables, spec, first)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.fastpeft.subspace_weight(weight, phi, tables, spec, first)  # type: ignore[no-any-return]


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
        spec: of :func:`spec_of`.
        first: the first blocks of the weight and of the bias; -1 for one that stays as it is.
        transposed: whether W_0 is [in_features, out_features], as of a Conv1D.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
    """
    _check("subspace_linear", weight, phi, spec)
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


def subspace_embedding(
    ids: Tensor,
    weight: Tensor,
    phi: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: int,
    padding_idx: int,
) -> Tensor:
    """Return rows of ``W_0 + P phi``: [..., width] in W_0's dtype.

    Where there are fewer tokens than rows, only their rows are projected; which is decided by the sizes
    alone.

    Args:
        ids: [...], whole numbers.
        weight: W_0 [rows, width]; frozen.
        phi: [n], fp32 or fp64.
        tables: of :func:`fastpeft.ops.subspace.tables`.
        spec: of :func:`spec_of`.
        first: the weight's first block.
        padding_idx: the row that gives no gradient; -1 for none.

    Raises:
        ShapeError: phi does not have n elements, or is on another device.
    """
    _check("subspace_embedding", weight, phi, spec)
    if is_transformed():
        W = subspace_weight_reference(weight, phi, tables, spec, first)
        return F.embedding(ids, W, None if padding_idx < 0 else padding_idx)
    inputs = (ids, weight, phi, tables, spec, first, padding_idx)
    if runs_eagerly(weight):
        return _Embedding.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.fastpeft.subspace_embedding(*inputs)  # type: ignore[no-any-return]


def _check(op: str, weight: Tensor, phi: Tensor, spec: list[int]) -> None:
    n = _read(spec).block
    if phi.shape != (n,):
        raise ShapeError(f"{op}: expected phi [{n}], got {list(phi.shape)}")
    if phi.device != weight.device:
        raise ShapeError(f"{op}: expected all tensors on one device, got {weight.device} and {phi.device}")


@without_autocast
def _weight(weight: Tensor, phi: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    return add_projected(_read(spec), weight, phi, tables, first, weight.dtype)


@without_autocast
def _weight_gradient(gradient: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    return projected_gradient(_read(spec), gradient, tables, first)


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
    projection = _read(spec)
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
    projection, (at, bias_at) = _read(spec), first
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
        found.append(unflatten_tokens(gradient @ (W.t() if transposed else W), x.shape))
    return found if dphi is None else [*found, dphi]


def _rows_alone(projection: Projection, ids: Tensor, weight: Tensor) -> bool:
    return is_cheaper(projection, ids.numel(), weight)


@without_autocast
def _embedding(
    ids: Tensor,
    weight: Tensor,
    phi: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: int,
    padding_idx: int,
) -> Tensor:
    projection = _read(spec)
    if _rows_alone(projection, ids, weight):
        rows = rows_added(projection, weight, ids.reshape(-1), phi, tables, first)
    else:
        rows = add_projected(projection, weight, phi, tables, first, weight.dtype).index_select(
            0, ids.reshape(-1)
        )
    return rows.view(*ids.shape, weight.shape[1])


@without_autocast
def _embedding_gradient(
    dy: Tensor,
    ids: Tensor,
    weight: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: int,
    padding_idx: int,
) -> Tensor:
    projection = _read(spec)
    gradient, flat = flatten_tokens(dy), ids.reshape(-1)
    if not _rows_alone(projection, ids, weight):
        dW = torch.ops.aten.embedding_dense_backward(gradient, flat, weight.shape[0], padding_idx, False)
        return projected_gradient(projection, dW, tables, first)
    if padding_idx >= 0:
        gradient = gradient * (flat != padding_idx)[:, None]
    return rows_gradient(projection, gradient, flat, tables, first)


_weight_op = torch.library.custom_op("fastpeft::subspace_weight", _weight, mutates_args=())
_weight_back = torch.library.custom_op(
    "fastpeft::subspace_weight_backward", _weight_gradient, mutates_args=()
)
_linear_op = torch.library.custom_op("fastpeft::subspace_linear", _linear, mutates_args=())
_linear_back = torch.library.custom_op(
    "fastpeft::subspace_linear_backward", _linear_gradients, mutates_args=()
)
_embedding_op = torch.library.custom_op("fastpeft::subspace_embedding", _embedding, mutates_args=())
_embedding_back = torch.library.custom_op(
    "fastpeft::subspace_embedding_backward", _embedding_gradient, mutates_args=()
)


@_weight_op.register_fake
def _(weight: Tensor, phi: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@_weight_back.register_fake
def _(gradient: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    return tables[1].new_empty(_read(spec).block)


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


@_embedding_op.register_fake
def _(
    ids: Tensor,
    weight: Tensor,
    phi: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: int,
    padding_idx: int,
) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@_embedding_back.register_fake
def _(
    dy: Tensor,
    ids: Tensor,
    weight: Tensor,
    tables: list[Tensor],
    spec: list[int],
    first: int,
    padding_idx: int,
) -> Tensor:
    return tables[1].new_empty(_read(spec).block)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *ctx.options = inputs


def _weight_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    run = _weight_gradient if runs_eagerly(gradient) else torch.ops.fastpeft.subspace_weight_backward
    return None, run(gradient, *ctx.options), None, None, None


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


def _save_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, _, *ctx.options = inputs
    ctx.save_for_backward(ids, weight)


def _embedding_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    run = _embedding_gradient if runs_eagerly(dy) else torch.ops.fastpeft.subspace_embedding_backward
    return None, None, run(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None


def _for_op(backward: Callable[..., tuple[Any, ...]], place: int) -> Callable[..., tuple[Any, ...]]:
    """A custom op's backward gives a list for the list of tables, which is its argument at ``place``."""

    def wrapped(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        found = backward(ctx, gradient)
        return (*found[:place], [None, None], *found[place + 1 :])

    return wrapped


_weight_op.register_autograd(_for_op(_weight_backward, 2), setup_context=_save_weight)
_linear_op.register_autograd(_for_op(_linear_backward, 4), setup_context=_save_linear)
_embedding_op.register_autograd(_for_op(_embedding_backward, 3), setup_context=_save_embedding)


class _Weight(torch.autograd.Function):
    """``fastpeft::subspace_weight`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_weight(ctx, inputs, inputs[0])
        return _weight(*inputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _weight_backward(ctx, gradient)


class _Linear(torch.autograd.Function):
    """``fastpeft::subspace_linear`` likewise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_linear(ctx, inputs, inputs[0])
        return _linear(*inputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _linear_backward(ctx, dy)


class _Embedding(torch.autograd.Function):
    """``fastpeft::subspace_embedding`` likewise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_embedding(ctx, inputs, inputs[1])
        return _embedding(*inputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _embedding_backward(ctx, dy)
