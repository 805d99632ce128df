"""Who holds how much memory, and when: every storage from its first operation to its last reference.

:class:`Tracker` follows storages as :mod:`fastpeft.planning.storages` has it, and knows what each is for. A
plan and a measurement are the same code. What fastpeft's own ops allocate within a call is seen under
:func:`fastpeft.ops.eager.seen_through`.
"""

from __future__ import annotations

import bisect
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.planning.storages import Storage, Storages

_ANY = (torch.ops.aten.any.default, torch.ops.aten.any.dim, torch.ops.aten.any.dims)
_LATEST = 2**63  # sequence numbers of nodes that accumulate gradients are beyond this


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the step: what the step was doing, and the module at work (``""``: none, or the loss)."""

    phase: str
    module: str


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that was alive in a region: bytes in all, and by kind."""

    bytes: int
    by_kind: dict[str, int]


class Tracker(Storages):
    """Follows storages while it is entered; give it the model's with :meth:`hold` first.

    Args:
        model: whose modules are named.
        without_values: tensors have no data (fake, meta): every number read from one is 1, every two are
            equal, ``all()`` is true and ``any()`` is not, so that code that looks at values for what is out
            of the ordinary goes its usual way.

    Attributes:
        phase: what the step is doing; :meth:`enter` says so.
        live: bytes alive now.
    """

    def __init__(self, model: nn.Module, *, without_values: bool = False) -> None:
        super().__init__()
        self.phase = ""
        self._without_values = without_values
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[str] = []
        # (sequence number of the next autograd node, the module at work from it on).
        self._marks: list[tuple[int, str]] = []
        self._journal: list[tuple[Storage, int]] = []
        self._peaks: dict[Region, tuple[int, int]] = {}  # bytes, and the journal's length then

    def __enter__(self) -> Tracker:
        # Not by hooks: under them, even global ones, modules are not computed together with siblings.
        self._call = call = nn.Module.__call__

        def marked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self._paths.get(id(module))
            self._stack.append(path if path is not None else self._stack[-1] if self._stack else "")
            self._mark()
            try:
                return call(module, *args, **kwargs)
            finally:
                self._stack.pop()
                self._mark()

        nn.Module.__call__ = marked  # type: ignore[method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        nn.Module.__call__ = self._call  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def hold(self, tensors: Iterable[Tensor], kind: str | None = None, module: str | None = None) -> None:
        """Know these tensors' storages from now on, and of what kind and whose they are."""
        for tensor in tensors:
            storage = self.see(tensor)
            storage.kind = kind or storage.kind
            storage.module = storage.module if module is None else module

    def enter(self, phase: str) -> None:
        """The step goes on to something else."""
        self.phase = phase
        self._note_peak(Region(phase, ""))

    def living(self, kind: str) -> list[Storage]:
        """Return the living storages of one kind."""
        return [storage for storage in self.all_living() if storage.kind == kind]

    def begin(self) -> None:
        """Forget the peaks; what lives goes on."""
        self._journal = [(storage, storage.bytes) for storage in self.all_living()]
        self._peaks.clear()
        self._marks.clear()

    def peaks(self) -> dict[Region, Peak]:
        """Return the peak of every region since :meth:`begin`, by what each storage turned out to be."""
        found: dict[Region, Peak] = {}
        order = sorted(self._peaks.items(), key=lambda entry: entry[1][1])
        now: Counter[str] = Counter()
        done = 0
        for region, (size, place) in order:
            for storage, change in self._journal[done:place]:
                now[storage.kind] += change
            done = place
            found[region] = Peak(size, {kind: count for kind, count in now.items() if count})
        return found

    def journal(self) -> list[int]:
        """Return every change of the live bytes since :meth:`begin`, in order."""
        return [change for _, change in self._journal]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self._without_values:
            if func is torch.ops.aten._local_scalar_dense.default:
                return _one(args[0].dtype, is_any=self.see(args[0]).is_any)
            if func is torch.ops.aten.equal.default:
                return True
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in _ANY:
            self.see(result).is_any = True
        return result

    def made(self, size: int) -> Storage:
        """Where and when it comes to be."""
        return Storage(size, self.phase, self._module())

    def changed(self, storage: Storage, change: int) -> None:
        """Into the journal."""
        self._journal.append((storage, change))
        if change > 0:
            self._note_peak(Region(storage.phase, storage.module))

    def _note_peak(self, region: Region) -> None:
        if self.live > self._peaks.get(region, (-1, 0))[0]:
            self._peaks[region] = (self.live, len(self._journal))

    def _module(self) -> str:
        """The module at work: by the forward that runs, or by the forward that made the node that runs."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        number = _LATEST if node is None else int(node._sequence_nr())
        if number >= _LATEST:
            return ""
        place = bisect.bisect_right(self._marks, number, key=lambda mark: mark[0])
        return self._marks[place - 1][1] if place else ""

    def _mark(self) -> None:
        number: int = torch._C._autograd._get_sequence_nr()
        self._marks.append((number, self._stack[-1] if self._stack else ""))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Python's collector out of the way: storages in reference cycles would die at a chance moment."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _one(dtype: torch.dtype, *, is_any: bool) -> bool | int | float:
    if dtype is torch.bool:
        return not is_any
    return 1.0 if dtype.is_floating_point else 1
