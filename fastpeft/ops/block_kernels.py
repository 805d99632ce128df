"""The block ops on the triton backend: the kernels' arguments and results in the torch backend's form."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.kernel_paths import dora_forward, kernels, lora_forward
from fastpeft.ops.packed import Gradients
from fastpeft.ops.products import Need
from fastpeft.ops.stacked_torch import Stacked
from fastpeft_kernels.projection import Projection

# As many as `fastpeft_kernels.stacked` takes.
MAX_PROJECTIONS = 3


def stacked_forward(
    x: Tensor,
    projections: Sequence[Projection],
    dropout_p: float,
    seeds: Tensor | None,
    keep_z: Sequence[bool],
) -> Stacked:
    """:func:`fastpeft.ops.stacked_torch.forward` by kernels."""
    ys, S, zs = kernels().stacked_forward(x, projections, dropout_p, seeds, keep_z=keep_z)
    return Stacked(ys=ys, S=S, zs=zs)


def stacked_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    projections: Sequence[Projection],
    S: Tensor,
    kept: Sequence[Tensor | None],
    kept_is_z: Sequence[bool],
    dropout_p: float,
    seeds: Tensor | None,
    needs: Sequence[Need],
) -> tuple[Tensor | None, list[Gradients]]:
    """:func:`fastpeft.ops.stacked_torch.backward` by kernels."""
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
    )
    of_each = zip(*lists, strict=True)
    return dx, [Gradients(lora_A=dA, lora_B=dB, magnitude=dm, bias=db) for dA, dB, dm, db in of_each]


def gated_forward(
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    dropout_p: float,
    seeds: Tensor | None,
    keep_z: Sequence[bool],
    keep: bool,
) -> tuple[Stacked, Stacked]:
    """:func:`fastpeft.ops.gated_mlp_torch.forward` by kernels; without ``keep`` there are no g and u."""
    gate, up, down = projections
    inner_seeds, down_seed = (None, None) if seeds is None else (seeds[:2], seeds[2:])
    h, g, u, S, z_gate, z_up = kernels().glu_forward(
        x, gate, up, activation, dropout_p, inner_seeds, keep=keep, keep_z=tuple(keep_z[:2])
    )
    inner = Stacked(ys=[] if g is None else [g, u], S=S, zs=[z_gate, z_up])
    if down.lora_A is None or down.lora_B is None:
        y, S_down, z = F.linear(h, down.weight, down.bias), h.new_empty(h.shape[0], 0), None
    elif down.magnitude is None:
        y, S_down = lora_forward(
            h, down.weight, down.bias, down.lora_A, down.lora_B, down.scaling, dropout_p, down_seed
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
            dropout_p,
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
    dropout_p: float,
    seeds: Tensor | None,
    needs: Sequence[Need],
) -> tuple[Tensor | None, list[Gradients]]:
    """:func:`fastpeft.ops.gated_mlp_torch.backward` by kernels."""
    inner, (down,), need = projections[:2], projections[2:], needs[2]
    inner_seeds, down_seed = (None, None) if seeds is None else (seeds[:2], seeds[2:])
    if g is None or u is None:
        _, outer = stacked_backward(
            [dy], None, [down], S_down, kept[2:], kept_is_z[2:], dropout_p, down_seed, [need]
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
        dropout_p,
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
        [dg, du], x, inner, S, kept[:2], kept_is_z[:2], dropout_p, inner_seeds, needs[:2]
    )
    return dx, [*results, of_down]
