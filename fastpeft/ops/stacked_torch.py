"""Linears that share x on the torch backend, in ATen calls arranged for the fewest passes over memory.

Without dropout, the stacked A make one product with x in forward (``S = x [A_1; A_2; ..]^T``), one in
backward (``dA = dS^T x``) and one more for dx. Where another way than :mod:`fastpeft.ops.native` serves x
(:mod:`fastpeft.ops.ways`: a CPU that multiplies 16 bits slowly, a few tokens), it runs for one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import native
from fastpeft.ops._common import scaled_cast
from fastpeft.ops.dropout import keep, keep_, keep_bits, keep_scale
from fastpeft.ops.features import feature_dot, feature_sum, scale_features
from fastpeft.ops.packed import Gradients
from fastpeft.ops.products import Dropout, Forward, Need, RowScale
from fastpeft.ops.projections import adapter, rank
from fastpeft.ops.row_norm import checked_row_scale, magnitude_gradient
from fastpeft.ops.ways import dora_forward, way_for
from fastpeft_kernels.projection import Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacked:
    """Results of a forward.

    Attributes:
        ys: [tokens, out_features] each, in x's dtype.
        S: ``drop(x) A^T`` of all adapters side by side, [tokens, sum of r], in x's dtype.
        zs: DoRA's product before the row scale where it was asked for, else None.
    """

    ys: list[Tensor]
    S: Tensor
    zs: list[Tensor | None]


def scale_of(p: Projection) -> RowScale | None:
    """Return DoRA's row scale, None for LoRA."""
    return None if p.magnitude is None or p.norm is None else checked_row_scale(p.magnitude, p.norm)


def forward(
    x: Tensor,
    projections: Sequence[Projection],
    ps: Sequence[float],
    seeds: Tensor | None,
    keep_z: Sequence[bool],
) -> Stacked:
    """Return every projection of x [tokens, in_features].

    Dropout reaches the adapters only, with one probability and one seed a projection.
    """
    way = way_for(x)
    if way is not native:
        dropouts = [_dropout(ps[i], seeds, i) for i in range(len(projections))]
        results = [
            _one(way, x, p, dropout, z_is_kept)
            for p, dropout, z_is_kept in zip(projections, dropouts, keep_z, strict=True)
        ]
        S = torch.cat([result.S for result in results], dim=1)
        return Stacked(ys=[result.y for result in results], S=S, zs=[result.z for result in results])
    S = _down(x, projections, ps, seeds)
    ys: list[Tensor] = []
    zs: list[Tensor | None] = []
    for p, columns, z_is_kept in zip(projections, columns_of(projections), keep_z, strict=True):
        scale = scale_of(p)
        if scale is not None and native.scales_weight_forward(x, p.weight, p.bias):
            p, scale = _scaled(p, scale), None
        if scale is None or (scale.is_one and p.bias is not None):  # fastpeft.ops.ways.dora_forward says why
            ys.append(_product(x, p, p.bias, S[:, columns]))
            zs.append(_product(x, p, None, S[:, columns]) if z_is_kept else None)
            continue
        y = _product(x, p, None, S[:, columns])
        zs.append(y if z_is_kept else None)
        y = scale_features(y, scale, out=None if z_is_kept else y)
        if p.bias is not None:
            y.add_(p.bias)
        ys.append(y)
    return Stacked(ys=ys, S=S, zs=zs)


def _scaled(p: Projection, scale: RowScale) -> Projection:
    """Return the projection whose LoRA is p's DoRA."""
    assert p.lora_B is not None
    weight, lora_B = native.scaled_rows(p.weight, p.lora_B, scale)
    return replace(p, weight=weight, lora_B=lora_B, magnitude=None, norm=None)


def _product(x: Tensor, p: Projection, bias: Tensor | None, S: Tensor) -> Tensor:
    """Return ``x W^T + scaling * S B^T``, and the bias where it is given."""
    y = F.linear(x, p.weight, bias)
    if p.lora_B is not None:
        # In place, so that the rank-r product costs one pass over y and no [tokens, out_features] copy.
        y.addmm_(S, p.lora_B.to(x.dtype).t(), alpha=p.scaling)
    return y


def _one(way: ModuleType, x: Tensor, p: Projection, dropout: Dropout | None, keep_z: bool) -> Forward:
    """Return one projection by another way than native."""
    tensors = (x, p.weight, p.bias, *adapter(p), p.scaling, dropout)
    if (scale := scale_of(p)) is not None:
        return dora_forward(*tensors, scale, keep_z)
    result: Forward = way.forward(*tensors, None, keep_z)
    return result


def backward(
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
    """Return dx [tokens, in_features], where ``needs`` ask for it, and each projection's gradients.

    dys and kept (y, or z, for dm) are [tokens, out_features] each; x is needed for any lora_A's gradient.
    """
    dx, results, _ = backward_and_rank_gradient(dys, x, projections, S, kept, kept_is_z, ps, seeds, needs)
    return dx, results


def backward_and_rank_gradient(
    dys: Sequence[Tensor],
    x: Tensor | None,
    projections: Sequence[Projection],
    S: Tensor,
    kept: Sequence[Tensor | None],
    kept_is_z: Sequence[bool],
    ps: Sequence[float],
    seeds: Tensor | None,
    needs: Sequence[Need],
    *,
    in_place: bool = False,
) -> tuple[Tensor | None, list[Gradients], Tensor | None]:
    """:func:`backward`, and dS [tokens, sum of r], of which :func:`down_gradients` makes dA without x here.

    Another way than native gives no dS. ``in_place`` allows c * dY to be written over dY.
    """
    if way_for(dys[0], backward=True) is not native:
        dx, results = _backward_one_by_one(dys, x, projections, S, kept, kept_is_z, ps, seeds, needs)
        return dx, results, None
    dtype, dx, results = dys[0].dtype, None, []
    dS = dys[0].new_empty(dys[0].shape[0], S.shape[1])
    for i, (g, p, columns, need) in enumerate(
        zip(dys, projections, columns_of(projections), needs, strict=True)
    ):
        scale = scale_of(p)
        result = _column_gradients(
            p,
            scale,
            feature_sum(g) if need.bias else None,
            feature_dot(g, k) if need.dot and (k := kept[i]) is not None else None,
            kept_is_z[i],
        )
        results.append(result)
        if not (need.x or need.A or need.B):
            continue
        lora_B, c = p.lora_B, None
        if scale is not None and native.scales_weight(g, p.weight):
            p, c = _scaled(p, scale), scale.c  # which dB takes on when it is small
        elif scale is not None:
            g = scale_features(g, scale, out=g if in_place else None)
        if need.x:
            dx = g @ p.weight if dx is None else dx.addmm_(g, p.weight)
        if lora_B is not None and p.lora_B is not None:
            if need.x or need.A:
                torch.mm(g, scaled_cast(p.lora_B, p.scaling, dtype), out=dS[:, columns])
            if need.B:
                # S^T g, not g^T S: half the time at r = 16 (fastpeft.ops.native).
                dB = (S[:, columns].t() @ g).t().contiguous()
                if c is not None:
                    dB = dB * c[:, None]
                result.lora_B = scaled_cast(dB, p.scaling, lora_B.dtype)
    if dx is not None:
        _add_adapters(dx, dS, projections, ps, seeds)
    if x is not None:
        down_gradients(dS, x, projections, ps, seeds, needs, results)
    return dx, results, dS


def _column_gradients(
    p: Projection, scale: RowScale | None, bias: Tensor | None, dot: Tensor | None, kept_is_z: bool
) -> Gradients:
    """Return dbias and dm from colsum(dY) and colsum(dY * kept) in fp32 (fp64)."""
    dbias = None if bias is None or p.bias is None else bias.to(p.bias.dtype)
    dm = None
    if dot is not None and scale is not None and p.norm is not None and p.magnitude is not None:
        dm = magnitude_gradient(dot, scale, p.magnitude, p.norm, kept_is_z=kept_is_z)
    return Gradients(bias=dbias, magnitude=dm)


def _add_adapters(
    dx: Tensor, dS: Tensor, projections: Sequence[Projection], ps: Sequence[float], seeds: Tensor | None
) -> None:
    """Add mask * (dS A) to dx: one product for all adapters, where nothing is dropped."""
    if seeds is None:
        if dS.shape[1]:
            dx.addmm_(dS, _all_lora_a(projections, dx.dtype))
        return
    for i, (p, columns) in enumerate(zip(projections, columns_of(projections), strict=True)):
        if p.lora_A is not None:
            product = dS[:, columns] @ p.lora_A.to(dx.dtype)
            dx.add_(keep_(product, _bits(dx, ps[i], seeds[i])), alpha=keep_scale(ps[i]))


def _backward_one_by_one(
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
    dx, results = None, []
    for i, (p, columns) in enumerate(zip(projections, columns_of(projections), strict=True)):
        A, B = adapter(p)
        scale = scale_of(p)
        dropout = _dropout(ps[i], seeds, i)
        part = way_for(dys[i], backward=True).backward(
            dys[i], x, p.weight, A, B, S[:, columns], p.scaling, dropout, needs[i], scale, kept[i]
        )
        if part.x is not None:
            dx = part.x if dx is None else dx.add_(part.x)
        gradients = _column_gradients(p, scale, part.bias, part.dot, kept_is_z[i])
        gradients.lora_A = None if part.A is None else part.A.to(A.dtype)
        gradients.lora_B = None if part.B is None else part.B.to(B.dtype)
        results.append(gradients)
    return dx, results


def down_gradients(
    dS: Tensor,
    x: Tensor,
    projections: Sequence[Projection],
    ps: Sequence[float],
    seeds: Tensor | None,
    needs: Sequence[Need],
    results: Sequence[Gradients],
) -> None:
    """Put dA = dS^T drop(x) into ``results``: one read of x for all of them, where nothing is dropped."""
    stacked = dS.t() @ x if seeds is None and any(need.A for need in needs) else None
    for i, (p, columns) in enumerate(zip(projections, columns_of(projections), strict=True)):
        if p.lora_A is None or not needs[i].A:
            continue
        if stacked is not None:
            # A copy even where no cast makes one: a custom op's outputs may not share memory.
            results[i].lora_A = stacked[columns].to(p.lora_A.dtype, copy=True)
        elif seeds is not None:
            kept = keep(x, _bits(x, ps[i], seeds[i]))
            results[i].lora_A = scaled_cast(dS[:, columns].t() @ kept, keep_scale(ps[i]), p.lora_A.dtype)


def columns_of(projections: Sequence[Projection]) -> list[slice]:
    """Return every projection's columns of S; none of them without an adapter."""
    columns, start = [], 0
    for p in projections:
        columns.append(slice(start, start + rank(p)))
        start += rank(p)
    return columns


def _down(x: Tensor, projections: Sequence[Projection], ps: Sequence[float], seeds: Tensor | None) -> Tensor:
    """Return S [tokens, sum of r]."""
    if seeds is None:
        return x @ _all_lora_a(projections, x.dtype).t()
    S = x.new_empty(x.shape[0], sum(rank(p) for p in projections))
    for i, (p, columns) in enumerate(zip(projections, columns_of(projections), strict=True)):
        if p.lora_A is not None:
            kept = keep(x, _bits(x, ps[i], seeds[i]))
            A = scaled_cast(p.lora_A, keep_scale(ps[i]), x.dtype)
            torch.mm(kept, A.t(), out=S[:, columns])
    return S


def _all_lora_a(projections: Sequence[Projection], dtype: torch.dtype) -> Tensor:
    """Return every lora_A, one below the other: [sum of r, in_features]."""
    parts = [p.lora_A.to(dtype) for p in projections if p.lora_A is not None]
    if not parts:
        return adapter(projections[0])[0]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bits(like: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Return the mask of a seed for a tensor [tokens, in_features]."""
    return keep_bits(like.shape, dropout_p, seed, like)


def _dropout(p: float, seeds: Tensor | None, i: int) -> Dropout | None:
    return None if seeds is None or p == 0.0 else Dropout(p=p, seed=seeds[i])
