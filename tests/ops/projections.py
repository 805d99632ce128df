"""The projections of an intrinsic dimension, as the matrices they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.subspace import Projection, add_projected, coordinates, tables

KINDS = ["fastfood", "hashed"]
F64 = torch.float64


def projection_of(
    kind: str, d: int, numels: tuple[int, ...], seed: int = 3
) -> tuple[Projection, list[Tensor]]:
    """A projection of tensors of these sizes, and its tables in fp64."""
    projection = Projection(kind == "fastfood", d, seed, sum(numels))
    return projection, tables(projection, numels, F64)


def explicit(projection: Projection, tables_: list[Tensor], numels: tuple[int, ...] | list[int]) -> Tensor:
    """P [D, d], a column for each coordinate."""
    columns = []
    for unit in torch.eye(projection.d, dtype=F64):
        phi, first, parts = coordinates(projection, unit, tables_), 0, []
        for numel in numels:
            zero = torch.zeros(numel, dtype=F64)
            parts.append(add_projected(projection, zero, phi, tables_, first, F64))
            first += projection.blocks(numel)
        columns.append(torch.cat(parts))
    return torch.stack(columns, dim=1)
