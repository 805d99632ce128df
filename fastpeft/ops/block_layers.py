"""Blocks linear by linear on the triton backend: each projection by the path chosen for it alone.

What a block op falls back on where its shared launches lose, and what it does for a few tokens, where the
read of W takes the time and one kernel a linear spreads it over the device (``decode``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import kernel_paths
from fastpeft.ops.packed import Gradients
from fastpeft.ops.products import Need
from fastpeft.ops.stacked_torch import Stacked, columns_of
from fastpeft_kernels.projection import Projection


def forward(
    x: Tensor,
    projections: Sequence[Projection],
    dropout_p: float,
    seeds: Tensor | None,
    keep_z: Sequence[bool],
) -> Stacked:
    """:func:`fastpeft.ops.stacked_torch.forward`."""
    ys: list[Tensor] = []
    parts: list[Tensor] = []
    zs: list[Tensor | None] = []
    for i, p in enumerate(projections):
        z, seed = None, None if seeds is None else seeds[i : i + 1]
        if p.lora_A is None or p.lora_B is None:
            y = _base(x, p)
        else:
            linear = (x, p.weight, p.bias, p.lora_A, p.lora_B)
            if p.magnitude is None:
                y, S = kernel_paths.lora_forward(*linear, p.scaling, dropout_p, seed)
            else:
                y, S, z, _ = kernel_paths.dora_forward(
                    *linear,
                    p.magnitude,
                    p.norm,
                    p.scaling,
                    dropout_p,
                    seed,
                    drop_base=False,
                    keep_z=keep_z[i],
                )
            parts.append(S)
        ys.append(y)
        zs.append(z)
    if len(parts) == 1:
        return Stacked(ys=ys, S=parts[0], zs=zs)
    return Stacked(ys=ys, S=torch.cat(parts, 1) if parts else x.new_empty(x.shape[0], 0), zs=zs)


def backward(
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
    """:func:`fastpeft.ops.stacked_torch.backward`."""
    dx: Tensor | None = None
    results: list[Gradients] = []
    for i, (dy, p, columns, need) in enumerate(
        zip(dys, projections, columns_of(projections), needs, strict=True)
    ):
        seed = None if seeds is None else seeds[i : i + 1]
        of_x, found = _backward_of_one(dy, x, p, S[:, columns], kept[i], kept_is_z[i], dropout_p, seed, need)
        results.append(found)
        if of_x is not None:
            dx = of_x if dx is None else dx.add_(of_x)
    return dx, results


def _backward_of_one(
    dy: Tensor,
    x: Tensor | None,
    p: Projection,
    S: Tensor,
    kept: Tensor | None,
    kept_is_z: bool,
    dropout_p: float,
    seed: Tensor | None,
    need: Need,
) -> tuple[Tensor | None, Gradients]:
    bias_dtype = None if p.bias is None else p.bias.dtype
    if p.lora_A is None or p.lora_B is None:
        dx = torch.mm(dy, p.weight) if need.x else None
        dbias = dy.sum(0, dtype=torch.float32).to(bias_dtype) if need.bias else None
        return dx, Gradients(bias=dbias)
    needs: dict[str, Any] = {"need_x": need.x, "need_A": need.A, "need_B": need.B, "need_bias": need.bias}
    needs["bias_dtype"] = bias_dtype
    if p.magnitude is None or p.norm is None:
        dx, dA, dB, dbias = kernel_paths.lora_backward(
            dy, x, p.weight, p.lora_A, p.lora_B, S, p.scaling, dropout_p, seed, **needs
        )
        return dx, Gradients(lora_A=dA, lora_B=dB, bias=dbias)
    dx, dA, dB, dm, dbias = kernel_paths.kernels().dora_backward(
        dy,
        x,
        kept,
        p.weight,
        p.lora_A,
        p.lora_B,
        p.magnitude,
        p.norm,
        S,
        p.scaling,
        dropout_p,
        seed,
        drop_base=False,
        kept_is_z=kept_is_z,
        need_m=need.dot,
        **needs,
    )
    return dx, Gradients(lora_A=dA, lora_B=dB, magnitude=dm, bias=dbias)


def decode(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """Return the ys [tokens, out_features] of a few tokens, a launch each; DoRA's norms are given."""
    k = kernel_paths.kernels()
    ys: list[Tensor] = []
    for p in projections:
        if p.lora_A is None or p.lora_B is None:
            ys.append(_base(x, p))
        elif p.magnitude is None:
            ys.append(k.lora_decode(x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling))
        else:
            ys.append(k.dora_decode(x, p.weight, p.bias, p.lora_A, p.lora_B, p.magnitude, p.norm, p.scaling))
    return ys


def _base(x: Tensor, p: Projection) -> Tensor:
    return F.linear(x, p.weight, None if p.bias is None else p.bias.to(x.dtype))
