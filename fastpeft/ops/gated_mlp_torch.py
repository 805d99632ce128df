"""The gated MLP on the torch backend: elementwise work on chunks of rows that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import native, stacked_torch
from fastpeft.ops.packed import Gradients
from fastpeft.ops.products import Need
from fastpeft.ops.stacked_torch import Stacked
from fastpeft.ops.ways import way_for
from fastpeft_kernels.projection import Projection

# Of one operand. Anything from 2**16 to 2**19 took the same time; a whole tensor of 1024 x 4096, 10% more in
# bf16 and 55% more in fp32 (page faults of the temporaries).
CHUNK_ELEMENTS = 2**18
aten = torch.ops.aten


def forward(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    ps: Sequence[float],
    seeds: Tensor | None,
    keep_z: Sequence[bool],
    keep: bool,
) -> tuple[Stacked, Stacked]:
    """Return gate's and up's products of x [tokens, in_features] (g, u), and down's of h (y).

    Without ``keep``, h lies where g was.
    """
    inner_seeds, down_seeds = (None, None) if seeds is None else (seeds[:2], seeds[2:])
    inner = stacked_torch.forward(x, projections[:2], ps[:2], inner_seeds, keep_z[:2])
    g, u = inner.ys
    h = hidden(g, u, activation, out=None if keep else g)
    return inner, stacked_torch.forward(h, projections[2:], ps[2:], down_seeds, keep_z[2:])


def backward(
    dy: Tensor,
    x: Tensor | None,
    g: Tensor | None,
    u: Tensor | None,
    projections: Sequence[Projection],
    activation: str,
    S: Tensor,
    S_down: Tensor,
    kept: Sequence[Tensor | None],
    kept_is_z: Sequence[bool],
    ps: Sequence[float],
    seeds: Tensor | None,
    needs: Sequence[Need],
) -> tuple[Tensor | None, list[Gradients]]:
    """Return dx [tokens, in_features], where ``needs`` ask for it, and the gradients of gate, up and down.

    ``kept`` (for dm) is z where ``kept_is_z``, else g, u or y. ``needs[2].x`` says whether any gradient in
    front of h is wanted; g and u are there where it is or where down's lora_A trains.
    """
    inner, down = projections[:2], projections[2:]
    inner_seeds, down_seeds = (None, None) if seeds is None else (seeds[:2], seeds[2:])
    h = None
    wants_h = needs[2].A and g is not None and u is not None
    # Where dh is wanted too, h comes out of the pass that makes dg and du: one act(g) for all of them. Only
    # native gives a dS to make dA of later.
    if (
        g is not None
        and u is not None
        and wants_h
        and (not needs[2].x or way_for(dy, backward=True) is not native)
    ):
        h = hidden(g, u, activation)
    dh, outer, dS = stacked_torch.backward_and_rank_gradient(
        [dy], h, down, S_down, kept[2:], kept_is_z[2:], ps[2:], down_seeds, needs[2:]
    )
    if dh is None or g is None or u is None:
        return None, [Gradients(), Gradients(), *outer]
    later = torch.empty_like(g) if wants_h and h is None else None
    dg = hidden_gradients(dh, g, u, activation, later)
    if later is not None and dS is not None:
        stacked_torch.down_gradients(dS, later, down, ps[2:], down_seeds, needs[2:], outer)
    dx, results, _ = stacked_torch.backward_and_rank_gradient(
        [dg, dh], x, inner, S, kept[:2], kept_is_z[:2], ps[:2], inner_seeds, needs[:2], in_place=True
    )
    return dx, results + outer


def hidden(g: Tensor, u: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Return h = act(g) * u [tokens, d_ff]."""
    h = torch.empty_like(g) if out is None else out
    for rows in _chunks(g):
        torch.mul(activated(g[rows], activation), u[rows], out=h[rows])
    return h


def hidden_gradients(dh: Tensor, g: Tensor, u: Tensor, activation: str, h: Tensor | None) -> Tensor:
    """Return ``dg = dh * u * act'(g)``; write ``du = dh * act(g)`` over dh and, where it is given, h."""
    dg = torch.empty_like(g)
    for rows in _chunks(g):
        g_rows, u_rows, dh_rows = g[rows], u[rows], dh[rows]
        act = activated(g_rows, activation)
        _activation_backward(dh_rows * u_rows, g_rows, activation, dg[rows])
        dh_rows.mul_(act)
        if h is not None:
            torch.mul(act, u_rows, out=h[rows])
    return dg


def activated(g: Tensor, activation: str) -> Tensor:
    """Return act(g)."""
    if activation == "silu":
        return F.silu(g)
    return F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_backward(gradient: Tensor, g: Tensor, activation: str, out: Tensor) -> None:
    if activation == "silu":
        aten.silu_backward.grad_input(gradient, g, grad_input=out)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        aten.gelu_backward.grad_input(gradient, g, approximate=approximate, grad_input=out)


def _chunks(g: Tensor) -> Iterator[slice]:
    """Yield runs of rows, of about ``CHUNK_ELEMENTS`` at most on a CPU; on a GPU all of them."""
    tokens, features = g.shape
    rows = max(1, CHUNK_ELEMENTS // max(features, 1)) if g.is_cpu else max(tokens, 1)
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))
