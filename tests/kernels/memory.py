"""Poisoned and guarded buffers, for the interpreter and for a GPU alike.

Inputs lie inside larger storage that is NaN all round, so a read that strays into a result poisons it.
Outputs start as NaN, so what a kernel forgets to write shows, and lie between guard zones that are checked
afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from fastpeft_kernels import launch

PADDING = 7  # rows and columns of NaN on each side of an input: odd, so that nothing is aligned by luck
GUARD = 64  # elements on each side of an output
GUARD_BYTE = 0xA5


class GuardError(AssertionError):
    """A kernel wrote outside its output."""


def surrounded_by_nan(tensor: Tensor, padding: int = PADDING) -> Tensor:
    """A view equal to the 2-D `tensor` in the middle of a matrix of NaN."""
    rows, columns = tensor.shape
    storage = tensor.new_full((rows + 2 * padding, columns + 2 * padding), float("nan"))
    view = storage[padding : padding + rows, padding : padding + columns]
    view.copy_(tensor)
    return view


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Give every buffer the launchers allocate NaN content and guard zones; check the zones at the end."""
    buffers: list[tuple[Tensor, int]] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        guard_bytes, size_bytes = GUARD * 8, count * dtype.itemsize
        buffer = torch.full(
            (2 * guard_bytes + size_bytes,), GUARD_BYTE, dtype=torch.uint8, device=like.device
        )
        inner = buffer[guard_bytes : guard_bytes + size_bytes].view(dtype).view(shape)
        inner.fill_(float("nan") if dtype.is_floating_point else 0x5A)
        buffers.append((buffer, guard_bytes))
        return inner

    with mock.patch.object(launch, "empty", empty):
        yield
    for buffer, guard_bytes in buffers:
        zones = torch.cat([buffer[:guard_bytes], buffer[-guard_bytes:]])
        if (zones != GUARD_BYTE).any():
            raise GuardError(f"{int((zones != GUARD_BYTE).sum())} bytes outside an output were written")
