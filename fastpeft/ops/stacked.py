"""Linears that share their input (q/k/v, gate/up) as one op: x is read once for all adapters, and kept once.

For projection i, with or without an adapter, LoRA (Hu et al. 2021) or DoRA (Liu et al. 2024)::

    S = drop(x) [A_1; A_2; ..]^T      S_i = its columns of A_i      n_i = ||W_i + s_i B_i A_i||_row
    y_i = x W_i^T + s_i S_i B_i^T + bias_i                           LoRA
    y_i = c_i * (x W_i^T + s_i S_i B_i^T) + bias_i                   DoRA, c_i = m_i / n_i, detached

Backward, with ``g_i = c_i * dY_i`` (``dY_i`` for LoRA) and ``z_i = x W_i^T + s_i S_i B_i^T``::

    dS_i = s_i g_i B_i      dB_i = s_i g_i^T S_i      [dA_1; dA_2; ..] = dS^T drop(x)
    dx = sum_i g_i W_i + mask * (dS [A_1; A_2; ..])
    dm_i = colsum(dY_i * z_i) / n_i                   dbias_i = colsum(dY_i)

Saved for backward: ``S [tokens, sum of r]``, references to x (where any lora_A trains) and to the parameters,
and for DoRA the row norms and, where a magnitude trains, one [tokens, out_features] tensor: y_i, or z_i where
there is a bias or the dtype is fp16 (:mod:`fastpeft.ops.dora` says why).

As with single linears, a projection whose y the loss does not reach has no gradients, not zeros (AdamW would
decay its parameters), and a y of which nothing trains wants none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft import backend as backends
from fastpeft.errors import ShapeError
from fastpeft.ops import block_kernels, packed, remade, stacked_torch
from fastpeft.ops import projections as linears
from fastpeft.ops._common import flatten_tokens, unflatten_tokens, without_autocast
from fastpeft.ops.dropout import draw_seeds
from fastpeft.ops.eager import runs_eagerly
from fastpeft.ops.probability import Probability, as_inputs, from_inputs, number
from fastpeft.ops.second_order import differentiable, gradients_of, mask_of, saved_x
from fastpeft.ops.stacked_torch import Stacked, columns_of
from fastpeft_kernels.projection import Projection


def stacked_linear_reference(
    x: Tensor,
    projections: Sequence[Projection],
    masks: Sequence[Tensor | None] | None = None,
    dropout_on_base: bool = True,
) -> tuple[Tensor, ...]:
    """Each projection by its own formula, in whatever dtype x has; masks hold 0 or 1/(1-p)."""
    masks = [None] * len(projections) if masks is None else masks
    return tuple(
        linears.linear_reference(x, p, mask, dropout_on_base)
        for p, mask in zip(projections, masks, strict=True)
    )


def stacked_linear(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    dropout_p: Probability | Sequence[Probability] = 0.0,
    dropout_on_base: bool = True,
) -> tuple[Tensor, ...]:
    """Several linears of one x as one differentiable op.

    Args:
        x: ``[..., in_features]``, any strides, zero tokens allowed.
        projections: one or more, each with or without an adapter, LoRA or DoRA, of any out_features and rank.
            A weight is ``[out_features, in_features]`` of any strides in x's dtype; adapters are in x's dtype
            or fp32; DoRA's norm is computed where it is None.
        dropout_p: probability of zeroing an element of x on its way to a lora_A, one or a list by projection;
            every projection draws its own mask. 0 outside training.
        dropout_on_base: whether DoRA's base product drops its input too, as in PEFT. With dropout and DoRA,
            that is computed by the ops for single linears, not by this one: the same results, unfused.

    Returns:
        ``[..., out_features]`` of each projection, in x's dtype (in autocast's, where that is on). DoRA's is
        kept for backward where it has no bias, so autograd refuses to have it changed in place.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together; it says in which projection.
        BackendError: the backend chosen with :func:`fastpeft.set_backend` cannot run here.
    """
    if not projections:
        raise ShapeError("stacked_linear: expected at least one projection, got none")
    x, projections = linears.autocast(x, projections)
    ps = linears.spread(dropout_p, projections)
    for i, p in enumerate(projections):
        linears.check(f"stacked_linear, projection {i}", x, p)
    if linears.needs_plain_autograd(projections):
        # The op has no gradient for W (its point is a frozen base), plain autograd has.
        masks = [linears.draw_mask(x, p) for p in ps]
        return stacked_linear_reference(x, projections, masks, dropout_on_base)
    if linears.dropout_moves_base(projections, ps, dropout_on_base):
        return tuple(linears.linear(x, p, q) for p, q in zip(projections, ps, strict=True))
    backend = backends.resolve(x, op="stacked_linear")
    most = block_kernels.MAX_PROJECTIONS
    if backend == "triton" and len(projections) > most:
        first = stacked_linear(x, projections[:most], dropout_p=ps[:most], dropout_on_base=dropout_on_base)
        return first + stacked_linear(
            x, projections[most:], dropout_p=ps[most:], dropout_on_base=dropout_on_base
        )
    seeds = draw_seeds(x, ps, backend)
    if runs_eagerly(x) and not linears.needs_gradients(x, projections):
        if backend == "triton" and block_kernels.decodes(x, projections, seeds):
            return _decode(x, projections)
        keep_z = [False] * len(projections)
        _, result = _compute(x, projections, [number(p) for p in ps], seeds, keep_z, backend)
        return tuple(unflatten_tokens(y, x) for y in result.ys)
    tensors, layout, scalings = packed.pack(projections)
    if runs_eagerly(x):
        return _StackedLinear.apply(  # type: ignore[no-any-return,no-untyped-call]
            layout, scalings, [number(p) for p in ps], seeds, backend, x, *tensors
        )
    outputs: list[Tensor] = torch.ops.fastpeft.stacked_linear(
        x, tensors, layout, scalings, *as_inputs(ps), seeds, backend
    )
    return tuple(outputs[: len(projections)])


@without_autocast
def _decode(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Return the ys for a few tokens that nobody differentiates."""
    projections = [linears.with_norm(p, "triton") for p in projections]
    ys = block_kernels.stacked_decode(flatten_tokens(x), projections)
    return tuple(unflatten_tokens(y, x) for y in ys)


@without_autocast
def _compute(
    x: Tensor,
    projections: Sequence[Projection],
    dropout_p: Sequence[float],
    seeds: Tensor | None,
    keep_z: Sequence[bool],
    backend: str,
) -> tuple[list[Projection], Stacked]:
    """Return the projections with their norms, and what the backend makes of x's tokens."""
    complete = [linears.with_norm(p, backend) for p in projections]
    forward = block_kernels.stacked_forward if backend == "triton" else stacked_torch.forward
    return complete, forward(flatten_tokens(x), complete, dropout_p, seeds, keep_z)


def _forward(
    x: Tensor,
    tensors: list[Tensor],
    layout: list[int],
    scalings: list[float],
    dropout_p: list[float],
    live_p: Tensor | None,
    seeds: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """Return the ys, S, the norms that were not given and the zs that are kept, in that order."""
    dropout_p, seeds = from_inputs(dropout_p, live_p, seeds)
    given = packed.unpack(tensors, layout, scalings)
    complete, result = _compute(x, given, dropout_p, seeds, packed.keep_z(layout), backend)
    norms = packed.missing_norms(given, complete)
    zs = [z for z in result.zs if z is not None]
    return [*(unflatten_tokens(y, x) for y in result.ys), result.S, *norms, *zs]


@without_autocast
def _gradients(
    S: Tensor,
    dys: list[Tensor],
    x: Tensor | None,
    tensors: list[Tensor],
    layout: list[int],
    scalings: list[float],
    kept: list[Tensor | None],
    dropout_p: list[float],
    live_p: Tensor | None,
    seeds: Tensor | None,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    """Return the gradients that ``need`` (:func:`packed.needed`) asks for, in its order.

    ``kept`` is, per projection, z where ``layout`` says so, else y, or None where no dm is wanted.
    """
    dropout_p, seeds = from_inputs(dropout_p, live_p, seeds)
    backward = block_kernels.stacked_backward if backend == "triton" else stacked_torch.backward
    dx, gradients = backward(
        [flatten_tokens(dy) for dy in dys],
        None if x is None else flatten_tokens(x),
        packed.unpack(tensors, layout, scalings),
        S,
        [None if k is None else flatten_tokens(k) for k in kept],
        packed.keep_z(layout),
        dropout_p,
        seeds,
        packed.needs_of(need),
    )
    result = [] if dx is None else [unflatten_tokens(dx, dys[0])]
    for g in gradients:
        result += g.given()
    return result


_stacked_linear = torch.library.custom_op("fastpeft::stacked_linear", _forward, mutates_args=())
_stacked_linear_backward = torch.library.custom_op(
    "fastpeft::stacked_linear_backward", _gradients, mutates_args=()
)


@_stacked_linear.register_fake
def _(
    x: Tensor,
    tensors: list[Tensor],
    layout: list[int],
    scalings: list[float],
    dropout_p: list[float],
    live_p: Tensor | None,
    seeds: Tensor | None,
    backend: str,
) -> list[Tensor]:
    projections = packed.unpack(tensors, layout, scalings)
    tokens = math.prod(x.shape[:-1])
    return [
        *(x.new_empty(*x.shape[:-1], p.weight.shape[0]) for p in projections),
        x.new_empty(tokens, sum(linears.rank(p) for p in projections)),
        *packed.fake_norms_and_zs(tokens, projections, layout),
    ]


@_stacked_linear_backward.register_fake
def _(
    S: Tensor,
    dys: list[Tensor],
    x: Tensor | None,
    tensors: list[Tensor],
    layout: list[int],
    scalings: list[float],
    kept: list[Tensor | None],
    dropout_p: list[float],
    live_p: Tensor | None,
    seeds: Tensor | None,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    projections = packed.unpack(tensors, layout, scalings)
    in_features = projections[0].weight.shape[1]
    dx = [dys[0].new_empty(*dys[0].shape[:-1], in_features)] if need[0] else []
    return dx + packed.fake_gradients(projections, need)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, layout, scalings, dropout_p, live_p, seeds, backend = inputs
    ys, S, rest = output[: len(layout)], output[len(layout)], iter(output[len(layout) + 1 :])
    need = packed.needed(x, tensors, layout)
    needs = packed.needs_of(need)
    tensors, complete = packed.add_norms(tensors, layout, rest)
    zs = [next(rest) if z_is_kept else None for z_is_kept in packed.keep_z(layout)]
    kept = [(y if z is None else z) if n.dot else None for y, z, n in zip(ys, zs, needs, strict=True)]
    remade.save(ctx, [S, x if any(n.A for n in needs) else None, live_p, seeds, *kept, *tensors])
    ctx.set_materialize_grads(False)
    ctx.options = (need, layout, complete, scalings, dropout_p, backend)


def _untrained(inputs: tuple[Any, ...], output: list[Tensor]) -> list[Tensor]:
    """Return the ys of which neither x nor any parameter wants a gradient."""
    x, tensors, layout, *_ = inputs
    needs = packed.needs_of(packed.needed(x, tensors, layout))
    pairs = zip(output[: len(layout)], needs, strict=True)
    return [y for y, need in pairs if not (need.x or need.bias or need.A or need.B or need.dot)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*_untrained(inputs, output), *output[len(inputs[2]) :])


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return dx and, as a list, the gradients of the packed tensors, then None for everything else."""
    need, layout, complete, scalings, dropout_p, backend = ctx.options
    S, x, live_p, seeds, *rest = remade.saved(ctx)
    kept, tensors, own_layout = rest[: len(layout)], rest[len(layout) :], layout
    reached = [i for i, g in enumerate(grads[: len(layout)]) if g is not None]
    if not reached:
        return None, packed.no_gradients(layout), *(None,) * 6
    if len(reached) < len(layout):
        # The others take no part, as if they were not there.
        columns = columns_of(packed.unpack(tensors, complete, scalings))
        S = torch.cat([S[:, columns[i]] for i in reached], dim=1)
        tensors, complete = packed.select(tensors, complete, reached)
        need = [need[0], *(wanted for i in reached for wanted in need[1 + 4 * i : 5 + 4 * i])]
        kept, scalings, dropout_p, layout = (
            [entries[i] for i in reached] for entries in (kept, scalings, dropout_p, layout)
        )
        live_p, seeds = (None if t is None else torch.stack([t[i] for i in reached]) for t in (live_p, seeds))
        if live_p is None and not any(dropout_p):
            seeds = None
    gradients_of = _gradients if runs_eagerly(S) else torch.ops.fastpeft.stacked_linear_backward
    options = (dropout_p, live_p, seeds, backend, need)
    dys = [dy for i in reached if (dy := grads[i]) is not None]
    gradients = gradients_of(S, dys, x, tensors, complete, scalings, kept, *options)
    dx, placed = packed.in_places(gradients, need, layout)
    return dx, packed.spread_out(placed, own_layout, reached), *(None,) * 6


_stacked_linear.register_autograd(_backward, setup_context=_setup_context)


def _by_reference(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    need, layout, complete, scalings, dropout_p, backend = ctx.options
    _S, x, _live_p, seeds, *rest = remade.saved(ctx)
    tensors = rest[len(layout) :]
    like = next((dy for dy in grads if dy is not None), None)
    if like is None:
        return None, None, None, None, None, None, *packed.no_gradients(layout)
    x = saved_x(x, like, tensors[0].shape[1], [n.A or n.B or n.dot for n in packed.needs_of(need)])
    masks = [mask_of(x, p, seed, backend) for p, seed in linears.with_seeds(dropout_p, seeds)]

    def formula(x: Tensor, *tensors: Tensor) -> list[Tensor]:
        projections = packed.unpack(tensors, complete, scalings)
        # Dropout on DoRA's base product never comes here.
        return [
            linears.linear_reference(x, p, mask, False, p.norm)
            for p, mask in zip(projections, masks, strict=True)
        ]

    wanted = [need[0], *packed.need_by_tensor(need, complete)]
    dx, *placed = gradients_of(grads, [x, *tensors], wanted, formula)
    return None, None, None, None, None, dx, *packed.as_given(placed, layout, complete)


class _StackedLinear(torch.autograd.Function):
    """``fastpeft::stacked_linear`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: list[int],
        scalings: list[float],
        dropout_p: list[float],
        seeds: Tensor | None,
        backend: str,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (x, list(tensors), layout, scalings, dropout_p, None, seeds, backend)
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        if untrained := _untrained(inputs, output):
            ctx.mark_non_differentiable(*untrained)
        return tuple(output[: len(layout)])

    @staticmethod
    @differentiable(_by_reference)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, placed, *_ = _backward(ctx, grads)
        return None, None, None, None, None, dx, *placed
