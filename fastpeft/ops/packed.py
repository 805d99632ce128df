"""Projections as a custom op's arguments, outputs and gradients: flat lists, and what stands where.

A custom op's schema knows no dataclass, and autograd reaches into a list argument only where every entry is a
Tensor. So a block's projections travel as three lists: the tensors that are there, one bit mask a projection
that says which, and the scalings. The block ops put their outputs in one list as well, which ends in the DoRA
norms that were not given and the z that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastpeft.ops._common import accumulation_dtype
from fastpeft.ops.products import Need
from fastpeft_kernels.projection import Projection

T = TypeVar("T")
FIELDS = ("weight", "bias", "lora_A", "lora_B", "magnitude", "norm")
TRAINED = ("bias", "lora_A", "lora_B", "magnitude")
MAGNITUDE, NORM, KEEPS_Z = (1 << i for i in (4, 5, 6))


class Packed(NamedTuple):
    """Projections as a custom op's arguments.

    Attributes:
        tensors: the tensors that are there, projection by projection in the order of ``FIELDS``.
        layout: one bit mask a projection: bit i for ``FIELDS[i]``, and ``KEEPS_Z``.
        scalings: one a projection.
    """

    tensors: list[Tensor]
    layout: list[int]
    scalings: list[float]


@dataclass(kw_only=True)
class Gradients:
    """One projection's gradients, each in its parameter's dtype, None where not asked for."""

    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    magnitude: Tensor | None = None

    def given(self) -> list[Tensor]:
        """Return those that are there, in the order of ``TRAINED``."""
        return [t for t in (self.bias, self.lora_A, self.lora_B, self.magnitude) if t is not None]


def pack(projections: Sequence[Projection]) -> Packed:
    """Return the projections as lists; :func:`unpack` is the inverse."""
    tensors: list[Tensor] = []
    layout: list[int] = []
    for p in projections:
        bits = KEEPS_Z if _keeps_z(p) else 0
        for i, field in enumerate(FIELDS):
            if (tensor := getattr(p, field)) is not None:
                bits |= 1 << i
                tensors.append(tensor.detach() if field == "norm" else tensor)
        layout.append(bits)
    return Packed(tensors, layout, [float(p.scaling) for p in projections])


def unpack(tensors: Sequence[Tensor], layout: Sequence[int], scalings: Sequence[float]) -> list[Projection]:
    """Return the projections that :func:`pack` made these lists of."""
    by_field = _by_field(tensors, layout)
    return [Projection(**fields, scaling=s) for fields, s in zip(by_field, scalings, strict=True)]


def _by_field(entries: Sequence[T], layout: Sequence[int]) -> list[dict[str, T]]:
    """Return, projection by projection, the entry of each field that is there."""
    rest = iter(entries)
    return [{f: next(rest) for i, f in enumerate(FIELDS) if bits >> i & 1} for bits in layout]


def _keeps_z(p: Projection) -> bool:
    """Whether z is kept beside y for dm.

    Elsewhere y = c * z gives z back. It does not after a bias (``y - bias`` would cancel), nor in fp16 where
    c is near 0: such rows are some 1e-30 z and not 0 in y, which fp16 cannot hold.
    """
    if p.magnitude is None or not (p.magnitude.requires_grad and torch.is_grad_enabled()):
        return False
    return p.bias is not None or p.weight.dtype is torch.float16


def keep_z(layout: Sequence[int]) -> list[bool]:
    """Return, per projection, whether z is kept beside y."""
    return [bool(bits & KEEPS_Z) for bits in layout]


def needed(x: Tensor, tensors: Sequence[Tensor], layout: Sequence[int]) -> list[bool]:
    """Return which gradients are wanted: x's, then four a projection in the order of ``TRAINED``."""
    fields = _by_field([t.requires_grad for t in tensors], layout)
    return [x.requires_grad, *(f.get(name, False) for f in fields for name in TRAINED)]


def needs_of(need: Sequence[bool]) -> list[Need]:
    """Return :func:`needed`'s list by projection."""
    quads = [need[i : i + 4] for i in range(1, len(need), 4)]
    return [Need(x=need[0], bias=bias, A=A, B=B, dot=m) for bias, A, B, m in quads]


def missing_norms(given: Sequence[Projection], complete: Sequence[Projection]) -> list[Tensor]:
    """Return the norms of ``complete`` that ``given`` lacks."""
    pairs = zip(given, complete, strict=True)
    return [c.norm for g, c in pairs if g.norm is None and c.norm is not None]


def add_norms(
    tensors: Sequence[Tensor], layout: Sequence[int], norms: Iterator[Tensor]
) -> tuple[list[Tensor], list[int]]:
    """Return tensors and layout with the norms that forward computed in their places."""
    merged: list[Tensor] = []
    for bits, fields in zip(layout, _by_field(tensors, layout), strict=True):
        merged += fields.values()
        if bits & MAGNITUDE and not bits & NORM:
            merged.append(next(norms))
    return merged, [bits | NORM if bits & MAGNITUDE else bits for bits in layout]


def fake_norms_and_zs(tokens: int, projections: Sequence[Projection], layout: Sequence[int]) -> list[Tensor]:
    """Return the end of a block op's outputs, for its fake implementation."""
    weights = [p.weight for p in projections]
    norms = [
        w.new_empty(w.shape[0], dtype=accumulation_dtype(w.dtype))
        for w, bits in zip(weights, layout, strict=True)
        if bits & MAGNITUDE and not bits & NORM
    ]
    zs = [w.new_empty(tokens, w.shape[0]) for w, bits in zip(weights, layout, strict=True) if bits & KEEPS_Z]
    return norms + zs


def fake_gradients(projections: Sequence[Projection], need: Sequence[bool]) -> list[Tensor]:
    """Return the parameters' gradients that ``need`` asks for, for a fake implementation."""
    parameters = [getattr(p, name) for p in projections for name in TRAINED]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, wanted in zip(parameters, need[1:], strict=True)
        if wanted
    ]


def select(
    tensors: Sequence[Tensor], layout: Sequence[int], chosen: Sequence[int]
) -> tuple[list[Tensor], list[int]]:
    """Return tensors and layout of the projections of these numbers."""
    fields = _by_field(tensors, layout)
    return [t for i in chosen for t in fields[i].values()], [layout[i] for i in chosen]


def no_gradients(layout: Sequence[int]) -> list[None]:
    """Return None for every tensor of :func:`pack`'s list."""
    return [None for bits in layout for i in range(len(FIELDS)) if bits >> i & 1]


def need_by_tensor(need: Sequence[bool], layout: Sequence[int]) -> list[bool]:
    """Return :func:`needed`'s answer for every tensor of :func:`pack`'s list."""
    answers: list[bool] = []
    for i, bits in enumerate(layout):
        of_field = dict(zip(TRAINED, need[1 + 4 * i : 5 + 4 * i], strict=True))
        answers += [of_field.get(f, False) for j, f in enumerate(FIELDS) if bits >> j & 1]
    return answers


def as_given(
    gradients: Sequence[Tensor | None], layout: Sequence[int], complete: Sequence[int]
) -> list[Tensor | None]:
    """Return ``gradients`` of a list with the layout ``complete`` for the tensors of ``layout`` alone."""
    by_field = _by_field(gradients, complete)
    return [
        fields[f]
        for bits, fields in zip(layout, by_field, strict=True)
        for i, f in enumerate(FIELDS)
        if bits >> i & 1
    ]


def spread_out(
    placed: Sequence[Tensor | None], layout: Sequence[int], chosen: Sequence[int]
) -> list[Tensor | None]:
    """Return what :func:`in_places` made for the projections of these numbers, and None for the others."""
    rest = iter(placed)
    whole: list[Tensor | None] = []
    for i, bits in enumerate(layout):
        nothing = no_gradients([bits])
        whole += [next(rest) for _ in nothing] if i in chosen else nothing
    return whole


def in_places(
    gradients: Sequence[Tensor], need: Sequence[bool], layout: Sequence[int]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dx, and a gradient or None for every tensor of :func:`pack`'s list."""
    rest = iter(gradients)
    dx, *flat = (next(rest) if wanted else None for wanted in need)
    placed: list[Tensor | None] = []
    for i, bits in enumerate(layout):
        of_field = dict(zip(TRAINED, flat[4 * i : 4 * i + 4], strict=True))
        placed += [of_field.get(f) for j, f in enumerate(FIELDS) if bits >> j & 1]
    return dx, placed
