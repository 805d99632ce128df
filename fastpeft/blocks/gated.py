"""Gated MLPs, ``down(act(gate(x)) * up(x))``, found by what their forward does.

The class's own forward is run on a stand-in of the module with three tiny linears, and its result compared
with the formula's for every assignment of roles and every activation there is an op for. So no list of class
names or attribute names is needed, and a class that does anything else, be it a factor or a clamp, is left
alone. It is run with and without training and gradients, again and again, so that a dropout shows. What it
read of the module (:mod:`fastpeft.blocks.reads`) is compared at every call of the op: with another activation
in place, or a hook on it, the module's own forward runs.

Gate and up may be the halves of one linear's output (Phi-3's ``gate_up_proj``). Then the op gets views of its
weight, bias, lora_B and magnitude for each half and lora_A for both, so that the gradients reach the one
Parameter of each, and both halves drop the same elements of x.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fastpeft.blocks.reads import Notes, Reads, StandIn
from fastpeft.blocks.view import View, dropout_of, is_called_bare, view_of
from fastpeft.blocks.worth import is_worth_it
from fastpeft.in_place.adapters import is_replaced
from fastpeft.in_place.install import is_accelerated
from fastpeft.ops.gated_mlp import Activation, gated_mlp
from fastpeft.ops.gated_mlp_torch import activated
from fastpeft.ops.projections import dropout_moves_base
from fastpeft_kernels.projection import Projection

ATTRIBUTE = "_fastpeft_gated"
_FEW, _MORE = 3, 5  # features of the stand-in's linears
_DRAWS = 5  # runs in each mode: of a whole branch dropped at p = 0.1, 20 runs show one with 88 %


@dataclass(frozen=True, slots=True)
class Gated:
    """The roles of a gated MLP's children, and its activation.

    Attributes:
        gate: the child that computes it.
        up: likewise; the same child where each is half of its output.
        down: likewise.
        activation: of gate.
        reads: what the forward read of the module when this was found.
        gate_is_second: where gate and up are halves, whether gate is the second.
    """

    gate: str
    up: str
    down: str
    activation: Activation
    reads: Reads
    gate_is_second: bool = False

    @property
    def halves(self) -> bool:
        """Whether gate and up are the halves of one linear's output."""
        return self.gate == self.up

    def __str__(self) -> str:
        inner = f"{self.gate} (gate and up)" if self.halves else f"{self.gate}, {self.up}"
        return f"{inner} and {self.down} are one op ({self.activation})"


def find_roles(module: nn.Module, linears: dict[str, tuple[int, int]]) -> Gated | str | None:
    """Return the roles of a module's two or three linears, given as name to (in, out) features.

    A text says why one that has the shape of a gated MLP is left alone; None: it has not.
    """
    if len(linears) not in (2, 3):
        return None
    shape_fits = False
    for down in linears:
        inner = [name for name in linears if name != down]
        inside, outside = linears[down]
        # Together they make gate and up: d_ff features each.
        if any(linears[name] != (outside, 2 * inside // len(inner)) for name in inner):
            continue
        # Three square linears are an attention's more often than an MLP's: nothing to say if they are not.
        shape_fits = inside != outside
        if is_replaced(module):
            return "its forward was replaced by other code" if shape_fits else None
        if any(isinstance(child, nn.Dropout) and child.p > 0.0 for child in module.children()):
            return "it has a dropout of its own" if shape_fits else None
        roles = _confirmed(module, inner, down)
        if isinstance(roles, Gated) or (roles is not None and shape_fits):
            return roles
    return "its forward is not down(act(gate(x)) * up(x))" if shape_fits else None


def _confirmed(module: nn.Module, inner: list[str], down: str) -> Gated | str | None:
    """Return the roles, or why they are not always these; None where the formula is another."""
    sizes = dict.fromkeys(inner, (_FEW, 2 * _MORE // len(inner))) | {down: (_MORE, _FEW)}
    generator = torch.Generator("cpu").manual_seed(0)
    tiny: dict[str, nn.Linear] = {}
    x = torch.randn(2, _FEW, generator=generator, device="cpu", dtype=torch.float32)
    notes = Notes()
    with torch.no_grad(), _same_random_numbers_after():
        for name, (inside, outside) in sizes.items():
            tiny[name] = nn.Linear(inside, outside, bias=False, device="cpu", dtype=torch.float32)
            tiny[name].weight.copy_(torch.randn(outside, inside, generator=generator, device="cpu"))
        found = _run(module, tiny, notes, x, training=False)
        parts = torch.cat([tiny[name](x) for name in inner], dim=-1).chunk(2, dim=-1)
        for is_swapped, activation in itertools.product((False, True), get_args(Activation)):
            g, u = reversed(parts) if is_swapped else parts
            expected = tiny[down](activated(g, activation) * u)
            if _is_close(found, expected):
                break
        else:
            return None
        for training, grads, _ in itertools.product((False, True), (False, True), range(_DRAWS)):
            with torch.set_grad_enabled(grads):
                found = _run(module, tiny, notes, x, training=training)
            if not _is_close(found, expected):
                return "its forward is more than down(act(gate(x)) * up(x)) in training, or at random"
    gate, up = reversed(inner) if len(inner) == 2 and is_swapped else (inner[0], inner[-1])
    return Gated(gate, up, down, activation, notes.reads(module), len(inner) == 1 and is_swapped)


@contextmanager
def _same_random_numbers_after() -> Iterator[None]:
    before = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before)


def _run(module: nn.Module, linears: dict[str, nn.Linear], notes: Notes, x: Tensor, *, training: bool) -> Any:
    given = x[None].clone()
    try:
        found = type(module).forward(StandIn(module, linears, notes, training), given)
    except Exception:
        return None  # more than a function of its three linears: whatever it was, it is left alone
    return found if torch.equal(given[0], x) else None


def _is_close(found: Any, expected: Tensor) -> bool:
    fits = isinstance(found, Tensor) and found.shape == (1, *expected.shape)
    return fits and torch.allclose(found[0], expected, rtol=1e-5, atol=1e-6)


def gated_forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The module's forward: as one op where its linears are fit for it now, else its own."""
    roles = module.__dict__.get(ATTRIBUTE)
    # Other code that wraps a forward, as accelerate's hooks do, goes on calling ours when it was taken off.
    if isinstance(roles, Gated) and len(args) == 1 and not kwargs:
        x = args[0]
        if isinstance(x, Tensor) and x.is_floating_point() and not x.is_nested and is_worth_it(x):
            y = _fused(module, roles, x)
            if y is not None:
                return y
    return type(module).forward(module, *args, **kwargs)  # type: ignore[no-any-return]


def _fused(module: nn.Module, roles: Gated, x: Tensor) -> Tensor | None:
    children: dict[str, Any] = module._modules
    # Their own calls are left out, so nobody may be waiting for them.
    layers: list[Any] = [children.get(name) for name in dict.fromkeys((roles.gate, roles.up, roles.down))]
    if not roles.reads.hold(module):
        return None
    views: list[View] = []
    x_like = x
    for layer in layers:
        if layer is None or not is_called_bare(layer):
            return None
        if layer is layers[-1]:  # shapes like h's of a tensor that holds nothing
            d_ff = views[0].projection.weight.shape[0] // (2 if roles.halves else 1)
            x_like = x.new_empty(()).expand(*x.shape[:-1], d_ff)
        view = view_of(layer, x_like)
        if view is None:
            return None
        views.append(view)
    dropout = dropout_of(views)
    if dropout is None:
        return None
    ps, on_base = dropout
    projections = [view.projection for view in views]
    if dropout_moves_base(projections, ps, on_base):
        return None  # the op would leave that to single linears itself
    if roles.halves:
        projections, ps = [*_halves(projections[0], roles.gate_is_second), projections[1]], [ps[0], *ps]
    gate, up, down = projections
    for layer in layers:
        if layer is not None and is_accelerated(layer):
            layer._fastpeft_layer.calls.count("fused")
    return gated_mlp(
        x,
        gate,
        up,
        down,
        activation=roles.activation,
        dropout_p=ps,
        dropout_on_base=on_base,
        one_inner_mask=roles.halves,
    )


def _halves(p: Projection, gate_is_second: bool) -> tuple[Projection, Projection]:
    """Return gate and up as views of the linear that computes both; lora_A is both's."""

    # Not two slices: the gradient of a split is put together in one pass, a slice's is padded with zeros.
    def parts(t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if t is None:
            return None, None
        first, second = t.chunk(2)
        return (second, first) if gate_is_second else (first, second)

    fields = ("weight", "bias", "lora_B", "magnitude", "norm")
    by_field = {name: parts(getattr(p, name)) for name in fields}
    gate, up = ({name: pair[i] for name, pair in by_field.items()} for i in (0, 1))
    return replace(p, **gate), replace(p, **up)  # type: ignore[arg-type]  # a weight is always there


def is_ours(module: nn.Module) -> bool:
    """Whether a module's forward is :func:`gated_forward` now."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is gated_forward
