"""The block ops on the triton backend: their paths, and which of them runs.

``split`` runs the kernels for blocks: shared launches, one read of x for all S and for all dA, no h and no dh
in a gated MLP. ``aten`` shares S and dA and leaves the wide products to the vendor's GEMM, each followed by
one pass. ``layers`` takes every projection by the path chosen for it alone
(:mod:`fastpeft.ops.block_layers`), which is where TMA loads and the single kernel come in. ``decode`` is for
up to 16 tokens without gradients.
:mod:`fastpeft.choice` measures on a GPU; where nothing is measured, the first one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastpeft.choice import choice_key, choose
from fastpeft.ops import block_layers
from fastpeft.ops.gated_mlp_torch import hidden, hidden_gradients
from fastpeft.ops.kernel_paths import kernels
from fastpeft.ops.packed import Gradients
from fastpeft.ops.products import Need
from fastpeft.ops.projections import rank
from fastpeft.ops.stacked_torch import Stacked, columns_of
from fastpeft_kernels.projection import Projection
from fastpeft_kernels.when import MAX_DECODE_TOKENS, MAX_RANK

# As many as `fastpeft_kernels.stacked` takes.
MAX_PROJECTIONS = 3

Paths = dict[str, Callable[..., Any]]


def stacked_forward(
    x: Tensor,
    projections: Sequence[Projection],
    ps: Sequence[float],
    seeds: Tensor | None,
    keep_z: Sequence[bool],
) -> Stacked:
    """:func:`fastpeft.ops.stacked_torch.forward` by kernels."""
    if _differ(ps):
        parts = [
            stacked_forward(x, [p], [q], _seed(q, seeds, i), [z])
            for i, (p, q, z) in enumerate(zip(projections, ps, keep_z, strict=True))
        ]
        S = torch.cat([part.S for part in parts], dim=1)
        return Stacked(ys=[part.ys[0] for part in parts], S=S, zs=[part.zs[0] for part in parts])
    arguments = (x, projections, ps[0], seeds, keep_z)
    result: Stacked = _run("stacked_forward", STACKED_FORWARD, x, projections, arguments)
    return result


def _stacked_forward(
    x: Tensor,
    projections: Sequence[Projection],
    dropout_p: float,
    seeds: Tensor | None,
    keep_z: Sequence[bool],
    *,
    vendor_gemm: bool = False,
) -> Stacked:
    ys, S, zs = kernels().stacked_forward(
        x, projections, dropout_p, seeds, keep_z=keep_z, vendor_gemm=vendor_gemm
    )
    return Stacked(ys=ys, S=S, zs=zs)


STACKED_FORWARD: Paths = {
    "split": _stacked_forward,
    "aten": partial(_stacked_forward, vendor_gemm=True),
    "layers": block_layers.forward,
}


def _differ(ps: Sequence[float]) -> bool:
    """Whether the probabilities are not one, which is all a launch takes."""
    return any(p != ps[0] for p in ps)


def _seed(p: float, seeds: Tensor | None, i: int) -> Tensor | None:
    return None if seeds is None or p == 0.0 else seeds[i : i + 1]


def stacked_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    projections: Sequence[Projection],
    S: Tensor,
    kept: Sequence[Tensor | None],
    kept_is_z: Sequence[bool],
    ps: Sequence[float],
    seeds: Tensor | None,
    needs: Sequence[Need],
) -> tuple[Tensor | None, list[Gradients]]:
    """:func:`fastpeft.ops.stacked_torch.backward` by kernels."""
    if _differ(ps):
        one_by_one = [
            stacked_backward(
                [dys[i]], x, [p], S[:, columns], [kept[i]], [kept_is_z[i]],
                [ps[i]], _seed(ps[i], seeds, i), [needs[i]],
            )
            for i, (p, columns) in enumerate(zip(projections, columns_of(projections), strict=True))
        ]  # fmt: skip
        dxs = [dx for dx, _ in one_by_one if dx is not None]
        return (sum(dxs[1:], dxs[0]) if dxs else None), [results[0] for _, results in one_by_one]
    arguments = (dys, x, projections, S, kept, kept_is_z, ps[0], seeds, needs)
    paths = _backward_paths(projections) if needs[0].x else {"split": _stacked_backward}
    result: tuple[Tensor | None, list[Gradients]] = _run(
        "stacked_backward", paths, dys[0], projections, arguments
    )
    return result


def _backward_paths(projections: Sequence[Projection]) -> Paths:
    """With DoRA, the vendor's GEMM would need c * dY written."""
    paths: Paths = {"split": _stacked_backward}
    if all(p.magnitude is None for p in projections):
        paths["aten"] = partial(_stacked_backward, vendor_gemm=True)
    paths["layers"] = block_layers.backward
    return paths


def _stacked_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    projections: Sequence[Projection],
    S: Tensor,
    kept: Sequence[Tensor | None],
    kept_is_z: Sequence[bool],
    dropout_p: float,
    seeds: Tensor | None,
    needs: Sequence[Need],
    *,
    vendor_gemm: bool = False,
) -> tuple[Tensor | None, list[Gradients]]:
    dx, *lists = kernels().stacked_backward(
        dys,
        x,
        projections,
        S,
        kept,
        kept_is_z,
        dropout_p,
        seeds,
        need_x=needs[0].x,
        need_A=[need.A for need in needs],
        need_B=[need.B for need in needs],
        need_m=[need.dot for need in needs],
        need_bias=[need.bias for need in needs],
        bias_dtypes=[None if p.bias is None else p.bias.dtype for p in projections],
        vendor_gemm=vendor_gemm,
    )
    of_each = zip(*lists, strict=True)
    return dx, [Gradients(lora_A=dA, lora_B=dB, magnitude=dm, bias=db) for dA, dB, dm, db in of_each]


def gated_forward(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    ps: Sequence[float],
    seeds: Tensor | None,
    keep_z: Sequence[bool],
    keep: bool,
) -> tuple[Stacked, Stacked]:
    """:func:`fastpeft.ops.gated_mlp_torch.forward` by kernels; without ``keep`` there are no g and u."""
    inner_seeds, down_seed = (None, None) if seeds is None else (seeds[:2], seeds[2:])
    down_seed = None if ps[2] == 0.0 else down_seed
    if _differ(ps[:2]):
        arguments: tuple[Any, ...] = (x, projections[:2], activation, ps[:2], inner_seeds, keep_z[:2], keep)
        inner, h = _glu_forward_by(stacked_forward, *arguments)
    else:
        inner_seeds = None if ps[0] == 0.0 else inner_seeds
        arguments = (x, projections[:2], activation, ps[0], inner_seeds, keep_z[:2], keep)
        inner, h = _run("glu_forward", GLU_FORWARD, x, projections[:2], arguments)
    return inner, block_layers.forward(h, projections[2:], ps[2], down_seed, keep_z[2:])


def _glu_forward(
    x: Tensor,
    inner: Sequence[Projection],
    activation: str,
    dropout_p: float,
    seeds: Tensor | None,
    keep_z: Sequence[bool],
    keep: bool,
) -> tuple[Stacked, Tensor]:
    """Return gate's and up's products of x and h."""
    h, g, u, S, *zs = kernels().glu_forward(
        x, *inner, activation, dropout_p, seeds, keep=keep, keep_z=tuple(keep_z)
    )
    return Stacked(ys=[] if g is None else [g, u], S=S, zs=zs), h


def _glu_forward_by(
    stacked: Callable[..., Stacked],
    x: Tensor,
    inner: Sequence[Projection],
    activation: str,
    dropout_p: float | Sequence[float],
    seeds: Tensor | None,
    keep_z: Sequence[bool],
    keep: bool,
) -> tuple[Stacked, Tensor]:
    """:func:`_glu_forward` with g and u by a path of :func:`stacked_forward`, and h from memory."""
    result = stacked(x, inner, dropout_p, seeds, keep_z)
    g, u = result.ys
    h = hidden(g, u, activation, out=None if keep else g)
    return result if keep else Stacked(ys=[], S=result.S, zs=result.zs), h


GLU_FORWARD: Paths = {
    "split": _glu_forward,
    **{name: partial(_glu_forward_by, STACKED_FORWARD[name]) for name in ("aten", "layers")},
}


def gated_backward(
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
    """:func:`fastpeft.ops.gated_mlp_torch.backward` by kernels."""
    inner, down, need = projections[:2], projections[2:], needs[2]
    inner_seeds, down_seed = (None, None) if seeds is None else (seeds[:2], seeds[2:])
    inner_seeds = inner_seeds if any(ps[:2]) else None
    down_seed = None if ps[2] == 0.0 else down_seed
    if g is None or u is None:
        _, outer = _stacked_backward(
            [dy], None, down, S_down, kept[2:], kept_is_z[2:], ps[2], down_seed, [need]
        )
        return None, [Gradients(), Gradients(), *outer]
    paths: Paths = {"split": _glu_backward}
    if need.x:
        others = _backward_paths(down)
        paths |= {name: partial(_glu_backward_by, others[name]) for name in others if name != "split"}
    arguments = (dy, g, u, down[0], activation, S_down, kept[2], kept_is_z[2], ps[2], down_seed, need)
    dg, du, of_down = _run("glu_backward", paths, dy, down, arguments)
    if dg is None:
        return None, [Gradients(), Gradients(), of_down]
    dx, results = stacked_backward(
        [dg, du], x, inner, S, kept[:2], kept_is_z[:2], ps[:2], inner_seeds, needs[:2]
    )
    return dx, [*results, of_down]


def _glu_backward(
    dy: Tensor,
    g: Tensor,
    u: Tensor,
    down: Projection,
    activation: str,
    S: Tensor,
    kept: Tensor | None,
    kept_is_z: bool,
    dropout_p: float,
    seed: Tensor | None,
    need: Need,
) -> tuple[Tensor | None, Tensor | None, Gradients]:
    """Return dg and du, where h's gradient is wanted (``need.x``), and down's gradients."""
    dg, du, dA, dB, dm, dbias = kernels().glu_backward(
        dy,
        down,
        S,
        kept,
        g,
        u,
        activation,
        dropout_p,
        seed,
        kept_is_z=kept_is_z,
        need_h=need.x,
        need_A=need.A,
        need_B=need.B,
        need_m=need.dot,
        need_bias=need.bias,
        bias_dtype=None if down.bias is None else down.bias.dtype,
    )
    return dg, du, Gradients(lora_A=dA, lora_B=dB, magnitude=dm, bias=dbias)


def _glu_backward_by(
    stacked: Callable[..., tuple[Tensor, list[Gradients]]],
    dy: Tensor,
    g: Tensor,
    u: Tensor,
    down: Projection,
    activation: str,
    S: Tensor,
    kept: Tensor | None,
    kept_is_z: bool,
    dropout_p: float,
    seed: Tensor | None,
    need: Need,
) -> tuple[Tensor, Tensor, Gradients]:
    """:func:`_glu_backward` with down by a path of :func:`stacked_backward`; h and dh go to memory."""
    h = hidden(g, u, activation) if need.A else None
    dh, (of_down,) = stacked([dy], h, [down], S, [kept], [kept_is_z], dropout_p, seed, [need])
    return hidden_gradients(dh, g, u, activation, None), dh, of_down


def decodes(x: Tensor, projections: Sequence[Projection], seeds: Tensor | None) -> bool:
    """Whether ``x`` [..., in_features] is a case for the ``decode`` functions below."""
    few = 0 < x.numel() <= MAX_DECODE_TOKENS * x.shape[-1]
    return few and seeds is None and all(rank(p) <= MAX_RANK for p in projections)


def stacked_decode(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """Return the ys [tokens, out_features] for a few tokens; S is not kept, so there is no backward."""
    ys: list[Tensor] = _run("stacked_decode", STACKED_DECODE, x, projections, (x, projections))
    return ys


STACKED_DECODE: Paths = {
    "decode": block_layers.decode,
    "split": lambda x, projections: kernels().stacked_forward(x, projections)[0],
}


def gated_decode(x: Tensor, projections: Sequence[Projection], activation: str) -> Tensor:
    """:func:`stacked_decode` for a gated MLP: y [tokens, out_features]."""
    y: Tensor = _run("glu_decode", GLU_DECODE, x, projections, (x, projections, activation))
    return y


def _glu_decode(x: Tensor, projections: Sequence[Projection], activation: str) -> Tensor:
    g, u = block_layers.decode(x, projections[:2])
    return block_layers.decode(hidden(g, u, activation, out=g), projections[2:])[0]


def _glu_split(x: Tensor, projections: Sequence[Projection], activation: str) -> Tensor:
    _, h = _glu_forward(x, projections[:2], activation, 0.0, None, (False, False), False)
    return block_layers.forward(h, projections[2:], 0.0, None, [False]).ys[0]


GLU_DECODE: Paths = {"decode": _glu_decode, "split": _glu_split}


def _run(
    op: str, paths: Paths, wide: Tensor, projections: Sequence[Projection], arguments: tuple[Any, ...]
) -> Any:
    """Run the path of ``op`` that was chosen for these projections and as many tokens as ``wide`` has."""
    if len(paths) == 1:
        return next(iter(paths.values()))(*arguments)
    widths = tuple(p.weight.shape[0] for p in projections)
    key = choice_key(
        wide.shape[0], sum(widths), projections[0].weight.shape[1], max(map(rank, projections)), wide.dtype
    )
    name = _name(op, widths, any(p.magnitude is not None for p in projections))
    bound = {path: partial(run, *arguments) for path, run in paths.items()}
    return bound[choose(name, bound, key=key, device=wide.device)]()


@cache
def _name(op: str, widths: tuple[int, ...], dora: bool) -> str:
    """Blocks of one width in all and of different projections are measured apart, as LoRA and DoRA are."""
    return f"{op}{'_dora' if dora else ''} {'+'.join(map(str, widths))}"
