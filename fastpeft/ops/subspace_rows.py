"""Single rows of ``W_0 + P theta_d``: what an embedding reads, without the rest of its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastpeft.ops.subspace import Projection, _Draw


def span(projection: Projection, width: int) -> int:
    """How many blocks a row of ``width`` elements lies in at most."""
    n = projection.block
    if width % n == 0:
        return width // n
    return 1 if n % width == 0 else (width + n - 2) // n + 1


def is_cheaper(projection: Projection, rows: int, table: Tensor) -> bool:
    """Whether to project row by row (a row that comes twice, twice) instead of the whole table."""
    return rows * span(projection, table.shape[1]) < projection.blocks(table.numel())


def _by_rows(
    projection: Projection, ids: Tensor, width: int, first: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, their blocks, the places of their elements in those blocks [rows, width]), by chunks."""
    n, across = projection.block, span(projection, width)
    step = max(1, projection.chunk(ids) // across)
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        begin = ids[rows].long() * width
        block = torch.div(begin, n, rounding_mode="floor")
        blocks = block[:, None] + torch.arange(first, first + across, device=ids.device)
        yield rows, blocks.view(-1), (begin - block * n)[:, None] + torch.arange(width, device=ids.device)


def rows_added(
    projection: Projection, table: Tensor, ids: Tensor, phi: Tensor, tables: Sequence[Tensor], first: int
) -> Tensor:
    """Return rows of ``W_0 + P theta_d``: [rows, width] in the table's dtype, as the whole table has them."""
    result = torch.empty(len(ids), table.shape[1], dtype=table.dtype, device=table.device)
    for rows, blocks, places in _by_rows(projection, ids, table.shape[1], first):
        delta = _Draw(projection, blocks, tables).project(phi).view(len(places), -1)
        result[rows] = torch.gather(delta, 1, places).add_(table.index_select(0, ids[rows]))
    return result


def rows_gradient(
    projection: Projection, gradient: Tensor, ids: Tensor, tables: Sequence[Tensor], first: int
) -> Tensor:
    """Return the gradient of phi [n] for rows' gradients [rows, width]."""
    dtype = tables[1].dtype
    total = torch.zeros(projection.block, dtype=dtype, device=gradient.device)
    for rows, blocks, places in _by_rows(projection, ids, gradient.shape[1], first):
        v = torch.zeros(
            len(places), len(blocks) // len(places) * projection.block, dtype=dtype, device=gradient.device
        )
        v.scatter_(1, places, gradient[rows].to(dtype))
        total += _Draw(projection, blocks, tables).transposed(v.view(len(blocks), projection.block))
    return total
