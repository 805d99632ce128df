"""Poisoned and guarded buffers, for the interpreter and for a GPU alike.

Inputs lie inside larger storage that is NaN all round, so a read that strays into a result poisons it, and
that storage is compared whole afterwards, bit for bit. Outputs start as NaN, so what a kernel forgets to
write shows, and lie between guard zones that are checked afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastpeft_kernels import launch
from tests.kernels import interpreter

PADDING = 7  # rows and columns of NaN on each side of an input: odd, so that nothing is aligned by luck
GUARD = 64  # elements on each side of an output
GUARD_BYTE = 0xA5


class GuardError(AssertionError):
    """A kernel wrote outside its output."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a problem: in its fields, entries and items, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            yield from tensors_in(entry)


def _bytes(tensor: Tensor) -> Tensor:
    """All of the storage that `tensor` is a view of."""
    return tensor.new_empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]


class ChangedInputError(AssertionError):
    """A kernel wrote into its inputs or beside them."""


@contextmanager
def untouched(*inputs: Any) -> Iterator[None]:
    """Demand that the storages of all tensors in `inputs` hold the same bytes afterwards, views' rest too."""
    storages = {t.untyped_storage().data_ptr(): _bytes(t.detach()) for t in tensors_in(inputs) if t.numel()}
    before = [storage.clone() for storage in storages.values()]
    yield
    for storage, was in zip(storages.values(), before, strict=True):
        if not torch.equal(storage, was):
            raise ChangedInputError(f"{int((storage != was).sum())} bytes of an input's storage were changed")


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


@contextmanager
def every_guard(*inputs: Any) -> Iterator[None]:
    """Outputs NaN between guard zones, inputs untouched; under the interpreter every address is checked."""
    with ExitStack() as stack:
        stack.enter_context(untouched(*inputs))
        stack.enter_context(guarded_outputs())
        if interpreter.ACTIVE:
            stack.enter_context(interpreter.checked_addresses())
        yield
