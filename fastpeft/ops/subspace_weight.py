"""``W_0 + P phi`` of a weight that is used in no other way, and what the other ops of a subspace share.

    weight      W_0 + P phi                dphi = P^T dW

phi [n] is fp32 (fp64) whatever the weights are; the sum is rounded once, to the dtype of the product. Nothing
is saved for backward. (:mod:`fastpeft.ops.subspace_linear`, :mod:`fastpeft.ops.subspace_embedding`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import ShapeError
from fastpeft.ops._common import without_autocast
from fastpeft.ops.eager import is_transformed, runs_eagerly
from fastpeft.ops.second_order import differentiable
from fastpeft.ops.subspace import Projection, add_projected, project, projected_gradient


def subspace_weight_reference(
    weight: Tensor, phi: Tensor, tables: list[Tensor], spec: list[int], first: int
) -> Tensor:
    """The formula in ATen calls that everything differentiates: all blocks at once."""
    projection = Projection.from_spec(spec)
    blocks = torch.arange(first, first + projection.blocks(weight.numel()), device=weight.device)
    delta = project(projection, phi, blocks, tables).reshape(-1)[: weight.numel()].view(weight.shape)
    return (weight + delta).to(weight.dtype)


def subspace_weight(weight: Tensor, phi: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    """Return ``W_0 + P phi`` in W_0's dtype.

    Args:
        weight: W_0, of any shape; frozen.
        phi: [n], fp32 or fp64, of :func:`fastpeft.ops.subspace.coordinates`.
        tables: of :func:`fastpeft.ops.subspace.tables`, in phi's dtype.
        spec: of :meth:`fastpeft.ops.subspace.Projection.spec`.
        first: the weight's first block.

    Raises:
        ShapeError: phi does not have n elements, or is on another device.
    """
    check("subspace_weight", weight, phi, spec)
    if is_transformed():
        return subspace_weight_reference(weight, phi, tables, spec, first)
    if runs_eagerly(weight):
        return _Weight.apply(weight, phi, tables, spec, first)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.fastpeft.subspace_weight(weight, phi, tables, spec, first)  # type: ignore[no-any-return]


def check(op: str, weight: Tensor, phi: Tensor, spec: list[int]) -> None:
    """Raise ShapeError unless phi has n elements and lies where the weight does."""
    n = Projection.from_spec(spec).block
    if phi.shape != (n,):
        raise ShapeError(f"{op}: expected phi [{n}], got {list(phi.shape)}")
    if phi.device != weight.device:
        raise ShapeError(f"{op}: expected all tensors on one device, got {weight.device} and {phi.device}")


def for_op(backward: Callable[..., tuple[Any, ...]], place: int) -> Callable[..., tuple[Any, ...]]:
    """A custom op's backward gives a list for the list of tables, which is its argument at ``place``."""

    def wrapped(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        found = backward(ctx, gradient)
        return (*found[:place], [None, None], *found[place + 1 :])

    return wrapped


@without_autocast
def _weight(weight: Tensor, phi: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    return add_projected(Projection.from_spec(spec), weight, phi, tables, first, weight.dtype)


@without_autocast
def _weight_gradient(gradient: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    return projected_gradient(Projection.from_spec(spec), gradient, tables, first)


_weight_op = torch.library.custom_op("fastpeft::subspace_weight", _weight, mutates_args=())
_weight_back = torch.library.custom_op(
    "fastpeft::subspace_weight_backward", _weight_gradient, mutates_args=()
)


@_weight_op.register_fake
def _(weight: Tensor, phi: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@_weight_back.register_fake
def _(gradient: Tensor, tables: list[Tensor], spec: list[int], first: int) -> Tensor:
    return tables[1].new_empty(Projection.from_spec(spec).block)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *ctx.options = inputs


def _weight_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    run = _weight_gradient if runs_eagerly(gradient) else torch.ops.fastpeft.subspace_weight_backward
    return None, run(gradient, *ctx.options), None, None, None


_weight_op.register_autograd(for_op(_weight_backward, 2), setup_context=_save_weight)


class _Weight(torch.autograd.Function):
    """``fastpeft::subspace_weight`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save_weight(ctx, inputs, inputs[0])
        return _weight(*inputs)

    @staticmethod
    @differentiable()
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _weight_backward(ctx, gradient)
