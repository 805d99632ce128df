"""Gated MLPs, ``down(act(gate(x)) * up(x))``, found by what their forward does.

The class's own forward is run on a stand-in of the module with three tiny linears, and its result compared
with the formula's for every assignment of roles and every activation there is an op for. So no list of class
names or attribute names is needed, and a class that does anything else, be it a factor or a clamp, is left
alone.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fastpeft.blocks.view import View, dropout_of, is_called_bare, view_of
from fastpeft.in_place.adapters import is_replaced
from fastpeft.in_place.install import is_accelerated
from fastpeft.ops.gated_mlp import Activation, gated_mlp
from fastpeft.ops.gated_mlp_torch import activated
from fastpeft.ops.projections import dropout_moves_base

ATTRIBUTE = "_fastpeft_gated"
_FEW, _MORE = 3, 5  # features of the stand-in's linears


@dataclass(frozen=True, slots=True)
class Gated:
    """The roles of a gated MLP's children, and its activation."""

    gate: str
    up: str
    down: str
    activation: Activation


class _StandIn:
    """The module, but for three of its linears."""

    def __init__(self, module: nn.Module, linears: dict[str, nn.Linear]) -> None:
        self._module = module
        self._linears = linears

    def __getattr__(self, name: str) -> Any:
        return self._linears[name] if name in self._linears else getattr(self._module, name)


def find_roles(module: nn.Module, linears: dict[str, tuple[int, int]]) -> Gated | str | None:
    """Return the roles of a module's three linears, given as name to (in, out) features.

    A text says why one that has the shape of a gated MLP is left alone; None: it has not.
    """
    if len(linears) != 3:
        return None
    shape_fits = False
    for down in linears:
        gate, up = (name for name in linears if name != down)
        inside, outside = linears[down]
        if linears[gate] != linears[up] or linears[gate] != (outside, inside):
            continue
        # Three square linears are an attention's more often than an MLP's: nothing to say if they are not.
        shape_fits = inside != outside
        if is_replaced(module):
            return "its forward was replaced by other code" if shape_fits else None
        if any(isinstance(child, nn.Dropout) and child.p > 0.0 for child in module.children()):
            return "it has a dropout of its own" if shape_fits else None
        roles = _confirmed(module, gate, up, down)
        if roles is not None:
            return roles
    return "its forward is not down(act(gate(x)) * up(x))" if shape_fits else None


@torch.no_grad()
def _confirmed(module: nn.Module, gate: str, up: str, down: str) -> Gated | None:
    sizes = {gate: (_FEW, _MORE), up: (_FEW, _MORE), down: (_MORE, _FEW)}
    generator = torch.Generator("cpu").manual_seed(0)
    tiny: dict[str, nn.Linear] = {}
    for name, (inside, outside) in sizes.items():
        tiny[name] = nn.Linear(inside, outside, bias=False, device="cpu", dtype=torch.float32)
        tiny[name].weight.copy_(torch.randn(outside, inside, generator=generator, device="cpu"))
    x = torch.randn(2, _FEW, generator=generator, device="cpu", dtype=torch.float32)
    try:
        found = type(module).forward(_StandIn(module, tiny), x[None])
    except Exception:
        return None  # more than a function of its three linears: whatever it was, it is left alone
    if not isinstance(found, Tensor) or found.shape != (1, 2, _FEW):
        return None
    for (first, second), activation in itertools.product(((gate, up), (up, gate)), get_args(Activation)):
        expected = tiny[down](activated(tiny[first](x), activation) * tiny[second](x))
        if torch.allclose(found[0], expected, rtol=1e-5, atol=1e-6):
            return Gated(first, second, down, activation)
    return None


def gated_forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The module's forward: as one op where its linears are fit for it now, else its own."""
    roles: Gated = module._fastpeft_gated
    if not args and not kwargs and x.is_floating_point():
        y = _fused(module, roles, x)
        if y is not None:
            return y
    return type(module).forward(module, x, *args, **kwargs)  # type: ignore[no-any-return]


def _fused(module: nn.Module, roles: Gated, x: Tensor) -> Tensor | None:
    children: dict[str, Any] = module._modules
    # Their own calls are left out, so nobody may be waiting for them.
    layers = [children[name] for name in (roles.gate, roles.up, roles.down)]
    views: list[View] = []
    x_like = x
    for layer in layers:
        if layer is None or not is_called_bare(layer):
            return None
        if layer is layers[2]:  # shapes like h's of a tensor that holds nothing
            x_like = x.new_empty(()).expand(*x.shape[:-1], views[0].projection.weight.shape[0])
        view = view_of(layer, x_like)
        if view is None:
            return None
        views.append(view)
    dropout = dropout_of(views)
    if dropout is None:
        return None
    ps, on_base = dropout
    gate, up, down = projections = [view.projection for view in views]
    if dropout_moves_base(projections, ps, on_base):
        return None  # the op would leave that to single linears itself
    for layer in layers:
        if layer is not None and is_accelerated(layer):
            layer._fastpeft_layer.calls.count("fused")
    return gated_mlp(x, gate, up, down, activation=roles.activation, dropout_p=ps, dropout_on_base=on_base)


def is_ours(module: nn.Module) -> bool:
    """Whether a module's forward is :func:`gated_forward` now."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is gated_forward
