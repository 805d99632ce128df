"""The block ops on the triton backend: the kernels' arguments and results in the torch backend's form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.gated_mlp_torch import hidden
from fastpeft.ops.kernel_paths import dora_forward, kernels, lora_forward
from fastpeft.ops.packed import Gradients
from fastpeft.ops.products import Need
from fastpeft.ops.stacked_torch import Stacked, columns_of
from fastpeft_kernels.projection import Projection

# As many as `fastpeft_kernels.stacked` takes.
MAX_PROJECTIONS = 3


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
    ys, S, zs = kernels().stacked_forward(x, projections, ps[0], seeds, keep_z=keep_z)
    return Stacked(ys=ys, S=S, zs=zs)


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
    dx, *lists = kernels().stacked_backward(
        dys,
        x,
        projections,
        S,
        kept,
        kept_is_z,
        ps[0],
        seeds,
        need_x=needs[0].x,
        need_A=[need.A for need in needs],
        need_B=[need.B for need in needs],
        need_m=[need.dot for need in needs],
        need_bias=[need.bias for need in needs],
        bias_dtypes=[None if p.bias is None else p.bias.dtype for p in projections],
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
    gate, up, down = projections
    inner_seeds, down_seed = (None, None) if seeds is None else (seeds[:2], seeds[2:])
    if _differ(ps[:2]):
        inner = stacked_forward(x, [gate, up], ps[:2], inner_seeds, keep_z[:2])
        h = hidden(inner.ys[0], inner.ys[1], activation)
    else:
        inner_seeds = None if ps[0] == 0.0 else inner_seeds
        h, g, u, S, z_gate, z_up = kernels().glu_forward(
            x, gate, up, activation, ps[0], inner_seeds, keep=keep, keep_z=tuple(keep_z[:2])
        )
        inner = Stacked(ys=[] if g is None else [g, u], S=S, zs=[z_gate, z_up])
    down_seed = None if ps[2] == 0.0 else down_seed
    if down.lora_A is None or down.lora_B is None:
        y, S_down, z = F.linear(h, down.weight, down.bias), h.new_empty(h.shape[0], 0), None
    elif down.magnitude is None:
        y, S_down = lora_forward(
            h, down.weight, down.bias, down.lora_A, down.lora_B, down.scaling, ps[2], down_seed
        )
        z = None
    else:
        y, S_down, z, _ = dora_forward(
            h,
            down.weight,
            down.bias,
            down.lora_A,
            down.lora_B,
            down.magnitude,
            down.norm,
            down.scaling,
            ps[2],
            down_seed,
            drop_base=False,
            keep_z=keep_z[2],
        )
    return inner, Stacked(ys=[y], S=S_down, zs=[z])


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
    inner, (down,), need = projections[:2], projections[2:], needs[2]
    inner_seeds, down_seed = (None, None) if seeds is None else (seeds[:2], seeds[2:])
    inner_seeds = None if not any(ps[:2]) else inner_seeds
    down_seed = None if ps[2] == 0.0 else down_seed
    if g is None or u is None:
        _, outer = stacked_backward(
            [dy], None, [down], S_down, kept[2:], kept_is_z[2:], ps[2:], down_seed, [need]
        )
        return None, [Gradients(), Gradients(), *outer]
    dg, du, dA, dB, dm, dbias = kernels().glu_backward(
        dy,
        down,
        S_down,
        kept[2],
        g,
        u,
        activation,
        ps[2],
        down_seed,
        kept_is_z=kept_is_z[2],
        need_h=need.x,
        need_A=need.A,
        need_B=need.B,
        need_m=need.dot,
        need_bias=need.bias,
        bias_dtype=None if down.bias is None else down.bias.dtype,
    )
    of_down = Gradients(lora_A=dA, lora_B=dB, magnitude=dm, bias=dbias)
    if dg is None:
        return None, [Gradients(), Gradients(), of_down]
    dx, results = stacked_backward(
        [dg, du], x, inner, S, kept[:2], kept_is_z[:2], ps[:2], inner_seeds, needs[:2]
    )
    return dx, [*results, of_down]
