"""An embedding with ``W = W_0 + P theta_d``.

    y_t = (W_0 + P phi)[id_t]                    dphi = sum_t P_{id_t}^T dY_t

Saved for backward: references to ids and W_0. Where there are fewer tokens than rows, their rows alone are
projected (:mod:`fastpeft.ops.subspace_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops._common import flatten_tokens, without_autocast
from fastpeft.ops.eager import is_transformed, runs_eagerly
from fastpeft.ops.second_order import differentiable
from fastpeft.ops.subspace import Projection, add_projected, projected_gradient
from fastpeft.ops.subspace_rows import is_cheaper, rows_added, rows_gradient
from fastpeft.ops.subspace_weight import check, for_op, subspace_weight_reference


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
        spec: of :meth:`fastpeft.ops.subspace.Projection.spec`.
        first: the weight's first block.
        padding_idx: the row that gives no gradient; -1 for none.

    Raises:
        ShapeError: phi does not have n elements, or is on another device.
    """
    check("subspace_embedding", weight, phi, spec)
    if is_transformed():
        W = subspace_weight_reference(weight, phi, tables, spec, first)
        return F.embedding(ids, W, None if padding_idx < 0 else padding_idx)
    inputs = (ids, weight, phi, tables, spec, first, padding_idx)
    if runs_eagerly(weight):
        return _Embedding.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.fastpeft.subspace_embedding(*inputs)  # type: ignore[no-any-return]


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
    projection = Projection.from_spec(spec)
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
    projection = Projection.from_spec(spec)
    gradient, flat = flatten_tokens(dy), ids.reshape(-1)
    if not _rows_alone(projection, ids, weight):
        dW = torch.ops.aten.embedding_dense_backward(gradient, flat, weight.shape[0], padding_idx, False)
        return projected_gradient(projection, dW, tables, first)
    if padding_idx >= 0:
        gradient = gradient * (flat != padding_idx)[:, None]
    return rows_gradient(projection, gradient, flat, tables, first)


_embedding_op = torch.library.custom_op("fastpeft::subspace_embedding", _embedding, mutates_args=())
_embedding_back = torch.library.custom_op(
    "fastpeft::subspace_embedding_backward", _embedding_gradient, mutates_args=()
)


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
    return tables[1].new_empty(Projection.from_spec(spec).block)


def _save_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, _, *ctx.options = inputs
    ctx.save_for_backward(ids, weight)


def _embedding_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    run = _embedding_gradient if runs_eagerly(dy) else torch.ops.fastpeft.subspace_embedding_backward
    return None, None, run(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None


_embedding_op.register_autograd(for_op(_embedding_backward, 3), setup_context=_save_embedding)


class _Embedding(torch.autograd.Function):
    """``fastpeft::subspace_embedding`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_embedding(ctx, inputs, inputs[1])
        return _embedding(*inputs)

    @staticmethod
    @differentiable()
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _embedding_backward(ctx, dy)
