"""What would be launched: the package's launchers run on meta tensors with every kernel recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import mock

from fastpeft_kernels import configs, launch
from fastpeft_kernels.tile import KernelConfig, Table

from .families import FAMILIES
from .family import Case, Family, Kernel
from .specialised import Launch, Row, specialise

UNITS = 132  # multiprocessors the launchers are told of; only decides how reductions are split


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchedRow(KernelConfig):
    """A row that tells when its `num_warps` is read: tiles are read to choose, warps only to launch."""

    launched: Callable[[], None]

    def __getattribute__(self, name: str) -> Any:
        if name == "num_warps":
            object.__getattribute__(self, "launched")()
        return object.__getattribute__(self, name)


@dataclass(kw_only=True, slots=True)
class Recorded:
    """Launches of some cases, the rows they took, and those taken since the last launch."""

    launches: list[Launch] = field(default_factory=list)
    rows: set[Row] = field(default_factory=set)
    pending: set[Row] = field(default_factory=set)

    def take(self, row: Row) -> None:
        self.rows.add(row)
        self.pending.add(row)


class Recorder:
    """Stands in for a `triton.jit` function: notes the launch instead of making it."""

    def __init__(self, kernel: Any, note: Callable[[Any, dict[str, Any], dict[str, Any]], None]) -> None:
        self.kernel = kernel
        self.note = note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(*arguments: Any, **keywords: Any) -> None:
            names: list[str] = self.kernel.arg_names
            bound = dict(zip(names, arguments, strict=False))
            bound.update((name, keywords.pop(name)) for name in names if name in keywords)
            self.note(self.kernel, {name: bound[name] for name in names}, keywords)

        return call


def known(kernel: Any) -> Kernel:
    """The registered description of a `triton.jit` function; LookupError if no family names it."""
    module = kernel.__module__.removeprefix("fastpeft_kernels.")
    for family in FAMILIES:
        for entry in family.kernels:
            if (entry.module, entry.function) == (module, kernel.__name__):
                return entry
    raise LookupError(f"a case launches {kernel.__module__}.{kernel.__name__}, which no family names")


@contextmanager
def stand_ins(note: Callable[[Any, dict[str, Any], dict[str, Any]], None]) -> Iterator[None]:
    """Replace every `triton.jit` function of the package by a recorder, wherever a module refers to it."""
    from triton.runtime.jit import JITFunction

    with ExitStack() as stack:
        modules = [entry for name, entry in sys.modules.items() if name.startswith("fastpeft_kernels.")]
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    stack.enter_context(mock.patch.object(module, name, Recorder(value, note)))
        yield


def watched_tables(names: Sequence[str], found: Recorded) -> dict[str, Table]:
    """The named tables, with rows that note in `found` that they were launched."""

    def watched(place: Row, row: KernelConfig) -> WatchedRow:
        values = {entry.name: getattr(row, entry.name) for entry in fields(row)}
        return WatchedRow(**values, launched=lambda: found.take(place))

    return {
        name: {
            key: tuple(watched((name, key, index), row) for index, row in enumerate(rows))
            for key, rows in configs.TABLES[name].items()
        }
        for name in names
    }


def record(target: str, family: Family, *, quick: bool) -> Recorded:
    """Every launch that `family`'s cases (with `quick`, its default cases) make on `target`."""
    found = Recorded()
    tables = watched_tables((target, "fp32", "unaligned"), found)
    for case in family.cases(target):
        if quick and not case.default:
            continue

        def note(kernel: Any, bound: dict[str, Any], options: dict[str, Any], case: Case = case) -> None:
            rows = frozenset(found.pending)
            found.pending.clear()
            item = specialise(target, case, known(kernel), kernel.params, bound, options, rows)
            found.launches.append(item)

        with (
            mock.patch.object(configs, "architecture", return_value=target),
            mock.patch.object(configs, "TABLES", tables),
            mock.patch.object(launch, "unit_count", return_value=UNITS),
            stand_ins(note),
        ):
            case.run()
    return found


def unreached(target: str, family: Family, found: Recorded, *, quick: bool) -> list[str]:
    """Kernels and rows of `family` that no launch used; with `quick`, keys without any row used."""
    launched = {item.kernel for item in found.launches}
    missing = [
        f"{target}: no case of {family.name} launches {kernel.name}"
        for kernel in family.kernels
        if kernel not in launched
    ]
    for key in family.keys:
        if quick:
            if not any(taken == key for _, taken, _ in found.rows):
                missing.append(f"{target}: no default case of {family.name} reaches a row of {key}")
            continue
        for table in (target, "fp32", "unaligned"):
            for index, row in enumerate(configs.TABLES[table][key]):
                if (table, key, index) not in found.rows:
                    missing.append(f"{target}: no case of {family.name} reaches {table} {key} {row}")
    return missing


def unclaimed() -> list[str]:
    """Keys of the configuration tables that belong to no family."""
    claimed = {key for family in FAMILIES for key in family.keys}
    return [f"no family names the key {key}" for key in configs.KERNELS if key not in claimed]
