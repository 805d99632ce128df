"""The gated MLP (SwiGLU, GeGLU: Shazeer 2020, arXiv 2002.05202) with adapters, as one op.

::

    g = gate(x)      u = up(x)      h = act(g) * u      y = down(h)

where gate, up and down are linears with or without an adapter, LoRA or DoRA
(:mod:`fastpeft.ops.stacked` has their formulas). Backward, with dh from down's::

    dg = dh * u * act'(g)      du = dh * act(g)      h = act(g) * u again, for down's dA

and then gate's and up's backward with dg and du, which share x.

Saved for backward: ``g`` and ``u [tokens, d_ff]``, ``S`` of gate and up and ``S`` of down, references to x
(where gate's or up's lora_A trains) and to the parameters; for DoRA the row norms, and for the gradient of
down's magnitude y. Gate's and up's need nothing more, as g and u are their outputs. A z is kept beside them
where there is a bias or the dtype is fp16 (:mod:`fastpeft.ops.dora` says why). h is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastpeft import backend as backends
from fastpeft.errors import ConfigError, ShapeError
from fastpeft.ops import block_kernels, gated_mlp_torch, packed, remade
from fastpeft.ops import projections as linears
from fastpeft.ops._common import flatten_tokens, unflatten_tokens, without_autocast
from fastpeft.ops.dropout import draw_seeds
from fastpeft.ops.eager import runs_eagerly
from fastpeft.ops.gated_mlp_torch import activated
from fastpeft.ops.probability import Probability, as_inputs, from_inputs, number
from fastpeft.ops.products import Need
from fastpeft.ops.second_order import differentiable, gradients_of, mask_of, saved_x
from fastpeft.ops.stacked_torch import Stacked
from fastpeft_kernels.projection import Projection

Activation = Literal["silu", "gelu", "gelu_tanh"]
NAMES = ("gate", "up", "down")


def gated_mlp_reference(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    masks: Sequence[Tensor | None] = (None, None, None),
    dropout_on_base: bool = True,
) -> Tensor:
    """The formula, line for line, in whatever dtype x has; masks (of gate, up, down) hold 0 or 1/(1-p)."""
    g = linears.linear_reference(x, gate, masks[0], dropout_on_base)
    u = linears.linear_reference(x, up, masks[1], dropout_on_base)
    h = activated(g, activation) * u
    return linears.linear_reference(h, down, masks[2], dropout_on_base)


def gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: Activation = "silu",
    dropout_p: Probability | Sequence[Probability] = 0.0,
    dropout_on_base: bool = True,
    one_inner_mask: bool = False,
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` as one differentiable op.

    Args:
        x: ``[..., in_features]``, any strides, zero tokens allowed.
        gate: ``[d_ff, in_features]`` weight, with or without an adapter, LoRA or DoRA, as in
            :func:`fastpeft.ops.stacked.stacked_linear`.
        up: ``[d_ff, in_features]`` weight, likewise.
        down: ``[out_features, d_ff]`` weight, likewise.
        activation: ``silu`` (SwiGLU), ``gelu`` (GeGLU, with the error function) or ``gelu_tanh``.
        dropout_p: probability of zeroing an element of x, or h, on its way to a lora_A, one or a list of
            three; every projection draws its own mask. 0 outside training.
        dropout_on_base: whether DoRA's base product drops its input too, as in PEFT. With dropout and DoRA,
            that is computed by the ops for single linears, not by this one: the same results, unfused.
        one_inner_mask: whether gate and up drop the same elements of x, as halves of one linear do.

    Returns:
        ``[..., out_features]`` in x's dtype (in autocast's, where that is on). It is kept for backward where
        down is DoRA without a bias, so autograd refuses to have it changed in place.

    Raises:
        ConfigError: an activation that is none of the three.
        ShapeError: shapes, dtypes or devices do not fit together; it says in which projection.
        BackendError: the backend chosen with :func:`fastpeft.set_backend` cannot run here.
    """
    if activation not in get_args(Activation):
        raise ConfigError(
            f"gated_mlp: expected activation {', '.join(get_args(Activation))}, got {activation!r}"
        )
    x, projections = linears.autocast(x, (gate, up, down))
    ps = linears.spread(dropout_p, projections)
    gate, up, down = projections
    linears.check("gated_mlp, gate", x, gate)
    linears.check("gated_mlp, up", x, up)
    # Shapes like h's of a tensor that holds nothing.
    linears.check("gated_mlp, down", x.new_empty(1).expand(*x.shape[:-1], gate.weight.shape[0]), down)
    if up.weight.shape != gate.weight.shape:
        raise ShapeError(
            f"gated_mlp, up: expected a weight like gate's, {list(gate.weight.shape)}, "
            f"got {list(up.weight.shape)}"
        )
    if linears.needs_plain_autograd(projections):
        # The op has no gradient for W (its point is a frozen base), plain autograd has.
        h_like = x.new_empty(*x.shape[:-1], gate.weight.shape[0])
        masks = [linears.draw_mask(t, p) for t, p in zip((x, x, h_like), ps, strict=True)]
        if one_inner_mask:
            masks[1] = masks[0]
        return gated_mlp_reference(x, gate, up, down, activation, masks, dropout_on_base)
    if linears.dropout_moves_base(projections, ps, dropout_on_base):
        if one_inner_mask:
            raise ConfigError("gated_mlp: one mask for gate and up is not to be had with dropout on the base")
        h = activated(linears.linear(x, gate, ps[0]), activation) * linears.linear(x, up, ps[1])
        return linears.linear(h, down, ps[2])
    backend = backends.resolve(x, op="gated_mlp")
    seeds = draw_seeds(x, ps[1:] if one_inner_mask else ps, backend)
    if one_inner_mask and seeds is not None:
        seeds = torch.cat([seeds[:1], seeds])
    keep = linears.needs_gradients(x, projections)
    if runs_eagerly(x) and not keep:
        if backend == "triton" and block_kernels.decodes(x, projections, seeds):
            return _decode(x, projections, activation)
        now = [number(p) for p in ps]
        _, _, outer = _compute(x, projections, activation, now, seeds, [False] * 3, False, backend)
        return unflatten_tokens(outer.ys[0], x)
    tensors, layout, scalings = packed.pack(projections)
    if runs_eagerly(x):
        return _GatedMLP.apply(  # type: ignore[no-any-return,no-untyped-call]
            layout, scalings, activation, [number(p) for p in ps], seeds, keep, backend, x, *tensors
        )
    outputs: list[Tensor] = torch.ops.fastpeft.gated_mlp(
        x, tensors, layout, scalings, activation, *as_inputs(ps), seeds, keep, backend
    )
    return outputs[0]


@without_autocast
def _decode(x: Tensor, projections: Sequence[Projection], activation: str) -> Tensor:
    """Return y for a few tokens that nobody differentiates."""
    projections = [linears.with_norm(p, "triton") for p in projections]
    y = block_kernels.gated_decode(flatten_tokens(x), projections, activation)
    return unflatten_tokens(y, x)


@without_autocast
def _compute(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    dropout_p: Sequence[float],
    seeds: Tensor | None,
    keep_z: Sequence[bool],
    keep: bool,
    backend: str,
) -> tuple[list[Projection], Stacked, Stacked]:
    """Return the projections with their norms, and what the backend makes of x's tokens: g and u; y."""
    complete = [linears.with_norm(p, backend) for p in projections]
    forward = block_kernels.gated_forward if backend == "triton" else gated_mlp_torch.forward
    return complete, *forward(flatten_tokens(x), complete, activation, dropout_p, seeds, keep_z, keep)


def _forward(
    x: Tensor,
    tensors: list[Tensor],
    layout: list[int],
    scalings: list[float],
    activation: str,
    dropout_p: list[float],
    live_p: Tensor | None,
    seeds: Tensor | None,
    keep: bool,
    backend: str,
) -> list[Tensor]:
    """Return y, S of gate and up, S of down, g, u, the norms that were not given and the zs that are kept.

    g and u are empty without ``keep``.
    """
    dropout_p, seeds = from_inputs(dropout_p, live_p, seeds)
    given = packed.unpack(tensors, layout, scalings)
    kept_zs = packed.keep_z(layout)
    complete, inner, outer = _compute(x, given, activation, dropout_p, seeds, kept_zs, keep, backend)
    norms = packed.missing_norms(given, complete)
    zs = [z for z in (*inner.zs, *outer.zs) if z is not None]
    g, u = inner.ys if keep else (x.new_empty(0, p.weight.shape[0]) for p in complete[:2])
    return [unflatten_tokens(outer.ys[0], x), inner.S, outer.S, g, u, *norms, *zs]


@without_autocast
def _gradients(
    S: Tensor,
    S_down: Tensor,
    dy: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    tensors: list[Tensor],
    layout: list[int],
    scalings: list[float],
    kept: list[Tensor | None],
    activation: str,
    dropout_p: list[float],
    live_p: Tensor | None,
    seeds: Tensor | None,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    """Return the gradients that ``need`` (:func:`packed.needed`) asks for, in its order.

    ``kept`` is, per projection, z where ``layout`` says so, else y for down and None for gate and up.
    """
    dropout_p, seeds = from_inputs(dropout_p, live_p, seeds)
    backward = block_kernels.gated_backward if backend == "triton" else gated_mlp_torch.backward
    dx, gradients = backward(
        flatten_tokens(dy),
        None if x is None else flatten_tokens(x),
        g,
        u,
        packed.unpack(tensors, layout, scalings),
        activation,
        S,
        S_down,
        _kept_for_dm(kept, g, u),
        packed.keep_z(layout),
        dropout_p,
        seeds,
        _needs(need),
    )
    result = [] if dx is None else [unflatten_tokens(dx, dy)]
    for of_one in gradients:
        result += of_one.given()
    return result


def _needs(need: list[bool]) -> list[Need]:
    """Return what gate, up and down are asked for; down's x is h, in front of which lies everything else."""
    gate, up, down = packed.needs_of(need)
    return [gate, up, down._replace(x=need[0] or any(need[1:9]))]


def _kept_for_dm(kept: Sequence[Tensor | None], g: Tensor | None, u: Tensor | None) -> list[Tensor | None]:
    """Return what gives dm: the z that were kept, and elsewhere the outputs."""
    z_gate, z_up, of_down = kept
    y = None if of_down is None else flatten_tokens(of_down)
    return [g if z_gate is None else z_gate, u if z_up is None else z_up, y]


_gated_mlp = torch.library.custom_op("fastpeft::gated_mlp", _forward, mutates_args=())
_gated_mlp_backward = torch.library.custom_op("fastpeft::gated_mlp_backward", _gradients, mutates_args=())


@_gated_mlp.register_fake
def _(
    x: Tensor,
    tensors: list[Tensor],
    layout: list[int],
    scalings: list[float],
    activation: str,
    dropout_p: list[float],
    live_p: Tensor | None,
    seeds: Tensor | None,
    keep: bool,
    backend: str,
) -> list[Tensor]:
    projections = packed.unpack(tensors, layout, scalings)
    gate, up, down = projections
    tokens, d_ff = math.prod(x.shape[:-1]), gate.weight.shape[0]
    return [
        x.new_empty(*x.shape[:-1], down.weight.shape[0]),
        x.new_empty(tokens, linears.rank(gate) + linears.rank(up)),
        x.new_empty(tokens, linears.rank(down)),
        x.new_empty(tokens if keep else 0, d_ff),
        x.new_empty(tokens if keep else 0, d_ff),
        *packed.fake_norms_and_zs(tokens, projections, layout),
    ]


@_gated_mlp_backward.register_fake
def _(
    S: Tensor,
    S_down: Tensor,
    dy: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    tensors: list[Tensor],
    layout: list[int],
    scalings: list[float],
    kept: list[Tensor | None],
    activation: str,
    dropout_p: list[float],
    live_p: Tensor | None,
    seeds: Tensor | None,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    projections = packed.unpack(tensors, layout, scalings)
    dx = [dy.new_empty(*dy.shape[:-1], projections[0].weight.shape[1])] if need[0] else []
    return dx + packed.fake_gradients(projections, need)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, layout, scalings, activation, dropout_p, live_p, seeds, _, backend = inputs
    y, S, S_down, g, u, *rest = output
    need = packed.needed(x, tensors, layout)
    gate, up, down = _needs(need)
    others = iter(rest)
    tensors, complete = packed.add_norms(tensors, layout, others)
    kept = [next(others) if z_is_kept else None for z_is_kept in packed.keep_z(layout)]
    if down.dot and kept[2] is None:
        kept[2] = y
    g_u = (g, u) if down.x or down.A else (None, None)
    x = x if gate.A or up.A else None
    remade.save(ctx, [S, S_down, x, *g_u, live_p, seeds, *kept, *tensors])
    ctx.set_materialize_grads(False)
    ctx.options = (need, layout, complete, scalings, activation, dropout_p, backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return dx and, as a list, the gradients of the packed tensors, then None for everything else."""
    need, layout, complete, scalings, activation, dropout_p, backend = ctx.options
    if (dy := grads[0]) is None:
        return None, packed.no_gradients(layout), *(None,) * 8
    S, S_down, x, g, u, live_p, seeds, *rest = remade.saved(ctx)
    kept, tensors = rest[:3], rest[3:]
    gradients_of = _gradients if runs_eagerly(S) else torch.ops.fastpeft.gated_mlp_backward
    gradients = gradients_of(
        S,
        S_down,
        dy,
        x,
        g,
        u,
        tensors,
        complete,
        scalings,
        kept,
        activation,
        dropout_p,
        live_p,
        seeds,
        backend,
        need,
    )
    dx, placed = packed.in_places(gradients, need, layout)
    return dx, placed, *(None,) * 8


_gated_mlp.register_autograd(_backward, setup_context=_setup_context)


def _by_reference(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    need, layout, complete, scalings, activation, dropout_p, backend = ctx.options
    if dy is None:
        return *(None,) * 8, *packed.no_gradients(layout)
    _S, _S_down, x, _g, _u, _live_p, seeds, *rest = remade.saved(ctx)
    tensors = rest[3:]
    x = saved_x(x, dy, tensors[0].shape[1], (True,))
    h_like = x.new_empty(()).expand(*x.shape[:-1], tensors[0].shape[0])
    pairs = zip((x, x, h_like), linears.with_seeds(dropout_p, seeds), strict=True)
    masks = [mask_of(like, p, seed, backend) for like, (p, seed) in pairs]

    def formula(x: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        projections = packed.unpack(tensors, complete, scalings)
        # Dropout on DoRA's base product never comes here.
        g, u = (
            linears.linear_reference(x, p, mask, False, p.norm)
            for p, mask in zip(projections[:2], masks[:2], strict=True)
        )
        h = activated(g, activation) * u
        return (linears.linear_reference(h, projections[2], masks[2], False, projections[2].norm),)

    wanted = [need[0], *packed.need_by_tensor(need, complete)]
    dx, *placed = gradients_of((dy,), [x, *tensors], wanted, formula)
    return *(None,) * 7, dx, *packed.as_given(placed, layout, complete)


class _GatedMLP(torch.autograd.Function):
    """``fastpeft::gated_mlp`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: list[int],
        scalings: list[float],
        activation: str,
        dropout_p: list[float],
        seeds: Tensor | None,
        keep: bool,
        backend: str,
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        inputs = (x, list(tensors), layout, scalings, activation, dropout_p, None, seeds, keep, backend)
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @differentiable(_by_reference)
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, placed, *_ = _backward(ctx, (dy,))
        return None, None, None, None, None, None, None, dx, *placed
