"""Bytes and FLOPs of a kernel launch, counted from the launch itself in Triton's interpreter.

Nothing is computed: loads give zeros without touching memory, stores are dropped, products only count. So the
launchers can be called with tensors of the full shape (memory that is never touched costs nothing), and the
programs of a grid that differ in their first index only are alike: one of them, from the middle, runs, and is
taken times their number (one a projection where the grid runs through several: `alike`). What the program
that finishes a split reduction does besides (`finish.is_last`) is counted by a second run in which every
program is the last, and spread over the programs that share it. Nothing depends on the tensors' contents, so
launches whose arguments are alike are counted once.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastpeft_kernels import configs, launch

Builder = interpreter.InterpreterBuilder

Pass = tuple[str, str, Callable[[], object]]
"""Method, name of the pass, and what runs it."""


@dataclass(kw_only=True, slots=True)
class Operand:
    """A tensor argument of a launch: its shape, its bytes, and what all programs load and store of it."""

    name: str
    shape: tuple[int, ...]
    size: int
    loaded: float = 0.0
    stored: float = 0.0

    @property
    def compulsory(self) -> int:
        """Bytes if it comes from memory once and goes there once."""
        return self.size * (int(self.loaded > 0) + int(self.stored > 0))


@dataclass(kw_only=True, slots=True)
class LaunchTraffic:
    """One launch: the programs of its grid, their FLOPs on tensor cores, and its tensor arguments."""

    kernel: str
    programs: int
    flops: float = 0.0
    operands: list[Operand] = field(default_factory=list)

    @property
    def loaded(self) -> float:
        return sum(operand.loaded for operand in self.operands)

    @property
    def stored(self) -> float:
        return sum(operand.stored for operand in self.operands)

    @property
    def compulsory(self) -> int:
        return sum(operand.compulsory for operand in self.operands)


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a kernel's argument: itself, those of a tuple, that of a descriptor."""
    if isinstance(value, tuple):
        for index, entry in enumerate(value):
            yield from tensors_of(f"{name}[{index}]", entry)
    elif isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "block_shape"):
        yield name, value.base


def alike(kernel: str, bound: dict[str, Any], grid: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First indices of programs that stand for all, and how many programs each stands for.

    The column tiles of `stacked_gemm` belong to projections of different widths, ranks and epilogues, so it
    has one of the middle of each. Rank tiles of `grad_a` beside the first leave out dm and what it is made
    of: one of each. Every other grid has one.
    """
    if kernel == "grad_a":
        rank_tiles = launch.cdiv(bound["R"], bound["BLOCK_R"])
        columns = grid[0] // rank_tiles
        for i_r in range(rank_tiles):
            yield columns // 2 * rank_tiles + i_r, columns
        return
    if kernel != "stacked_gemm":
        yield grid[0] // 2, grid[0]
        return
    rows = launch.cdiv(bound["M"], bound["BLOCK_M"])
    tiles = [launch.cdiv(n, bound["BLOCK_N"]) for n in bound["N"]]
    i_m, group = rows // 2, bound["GROUP_M"]
    first_m = i_m // group * group
    rows_in_group = min(rows - first_m, group)
    for i, count in enumerate(tiles):
        i_n = sum(tiles[:i]) + count // 2
        # The inverse of `primitives.grouped_tile`.
        yield first_m * sum(tiles) + i_n * rows_in_group + i_m - first_m, rows * count


def described(value: Any) -> Any:
    """What a launch's traffic depends on in one of its arguments."""
    if isinstance(value, tuple):
        return tuple(map(described, value))
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if hasattr(value, "block_shape"):
        return described(value.base), tuple(value.block_shape)
    return value


_KNOWN: dict[Any, LaunchTraffic] = {}
"""By kernel, grid and `described` arguments, tiles included."""


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements; those along a stride of 0 are the same ones."""
    lengths = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return int(np.prod(lengths, dtype=np.int64)) * tensor.element_size()


class _Counter:
    """Counts what the program that runs now loads, stores and multiplies."""

    def __init__(self, tensors: list[tuple[str, Tensor]]) -> None:
        self.starts = np.array([tensor.data_ptr() for _, tensor in tensors], dtype=np.int64)
        self.order = np.argsort(self.starts, kind="stable")
        self.loaded = np.zeros(len(tensors))
        self.stored = np.zeros(len(tensors))
        self.flops = 0.0
        self.shares: list[int] = []

    def touch(self, counts: Any, pointers: Any, mask: Any) -> None:
        kept = np.asarray(mask.data).astype(bool)  # a descriptor's mask is a bare array, its data a buffer
        active = pointers.data[np.broadcast_to(kept, pointers.data.shape)]
        if active.size:
            width = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
            first = active.flat[0].astype(np.int64)
            place = np.searchsorted(self.starts[self.order], first, side="right") - 1
            counts[self.order[place]] += active.size * width


@contextmanager
def _counting(counter: _Counter, *, last: bool) -> Iterator[None]:
    """Replace memory and products by counts; every program is `last` in its reductions, or none."""
    load = Builder.create_masked_load

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        counter.touch(counter.loaded, pointers, mask)
        nothing = interpreter.TensorHandle(np.zeros(pointers.data.shape, dtype=bool), tl.int1)
        return load(self, pointers, nothing, *rest, **keywords)

    def create_masked_store(
        self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **keywords: Any
    ) -> None:
        counter.touch(counter.stored, pointers, mask)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        counter.flops += 2.0 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return d

    def rand4x(seed: Any, offset: Any) -> Any:
        return (offset.to(tl.float32),) * 4

    def is_last(p_counter: Any, n_programs: Any) -> bool:
        handle = getattr(n_programs, "handle", None)
        counter.shares.append(int(n_programs if handle is None else handle.data.item()))
        return last

    with ExitStack() as stack:
        for name, stand_in in (
            ("create_masked_load", create_masked_load),
            ("create_masked_store", create_masked_store),
            ("create_dot", create_dot),
        ):
            stack.enter_context(mock.patch.object(Builder, name, stand_in))
        stack.enter_context(mock.patch.object(tl, "rand4x", rand4x))  # ten rounds in numpy take minutes
        for name, module in list(sys.modules.items()):
            if name.startswith("fastpeft_kernels.") and hasattr(module, "is_last"):
                stack.enter_context(mock.patch.object(module, "is_last", is_last))
        yield


def _merge(operands: list[Operand], counter: _Counter, weight: float) -> None:
    for index, operand in enumerate(operands):
        operand.loaded += weight * float(counter.loaded[index])
        operand.stored += weight * float(counter.stored[index])


@contextmanager
def counted(target: str, units: int) -> Iterator[list[LaunchTraffic]]:
    """Collect the traffic of every launch, with the tiles of `target` and a device of `units` units."""
    found: list[LaunchTraffic] = []
    call = interpreter.GridExecutor.__call__

    def run(self: Any, *arguments: Any, **keywords: Any) -> None:
        grid = (*self.grid, 1, 1)[:3]
        bound = dict(zip(inspect.getfullargspec(self.fn).args, arguments, strict=False)) | keywords
        key = (self.fn.__name__, grid, *((name, described(value)) for name, value in bound.items()))
        if key in _KNOWN:
            found.append(_KNOWN[key])
            return
        tensors = [entry for name, value in bound.items() for entry in tensors_of(name, value)]
        operands = [
            Operand(name=name, shape=tuple(entry.shape), size=distinct_bytes(entry))
            for name, entry in tensors
        ]
        traffic = LaunchTraffic(
            kernel=self.fn.__name__.removesuffix("_kernel"), programs=int(np.prod(grid)), operands=operands
        )

        def program(index: tuple[int, ...], *, last: bool) -> _Counter:
            counter = _Counter(tensors)

            def set_grid_dim(builder: Any, *ones: int) -> None:
                builder.grid_dim = grid

            def set_grid_idx(builder: Any, *zeros: int) -> None:
                builder.grid_idx = index

            with (
                _counting(counter, last=last),
                mock.patch.object(self, "grid", (1,)),
                mock.patch.object(Builder, "set_grid_dim", set_grid_dim),
                mock.patch.object(Builder, "set_grid_idx", set_grid_idx),
                mock.patch.object(self, "_init_args_hst", lambda args, kwargs: (args, kwargs)),
                mock.patch.object(self, "_restore_args_dev"),
            ):
                call(self, *arguments, **keywords)
            return counter

        first_indices = alike(traffic.kernel, bound, grid)
        for (first, count), *rest in itertools.product(first_indices, range(grid[1]), range(grid[2])):
            index = (first, *rest)
            plain = program(index, last=False)
            _merge(operands, plain, count)
            traffic.flops += count * plain.flops
            if plain.shares:
                share = count / plain.shares[0]
                _merge(operands, program(index, last=True), share)
                _merge(operands, plain, -share)
        _KNOWN[key] = traffic
        found.append(traffic)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", run),
        mock.patch.object(configs, "architecture", return_value=target),
        mock.patch.object(launch, "unit_count", return_value=units),
        torch.no_grad(),
    ):
        yield found
