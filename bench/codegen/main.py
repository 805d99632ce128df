"""The command line of the code-generation check."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from bench.options import Parser

from .families import FAMILIES
from .machine_code import Measured, compile_launches, faults
from .recording import record, unclaimed, unreached
from .specialised import Launch
from .targets import TARGETS

BATCH = 8  # launches in one run of the disassembler, which takes as long to start as one takes to compile

KERNELS = [kernel.name for family in FAMILIES for kernel in family.kernels]


def compile_all(launches: Sequence[Launch], workers: int) -> Iterator[tuple[Launch, Measured]]:
    """Compile in fresh processes, the compiler being single-threaded; in the order in which they finish."""
    todo = deque(batches(launches))
    with ExitStack() as stack:
        # A pool a worker: a compiler that dies takes its process along, and is then known by name.
        idle = [Worker(stack) for _ in range(workers)]
        busy: dict[Future[list[Measured]], tuple[Worker, list[Launch]]] = {}
        while True:
            while idle and todo:
                worker, batch = idle.pop(), todo.popleft()
                busy[worker.submit(batch)] = worker, batch
            if not busy:
                return
            for done in wait(busy, return_when=FIRST_COMPLETED).done:
                worker, batch = busy.pop(done)
                if not isinstance(done.exception(), BrokenProcessPool):
                    yield from zip(batch, done.result(), strict=True)
                else:
                    worker = Worker(stack)
                    if len(batch) == 1:
                        yield batch[0], Measured(error="the compiler process died")
                    else:
                        todo.extendleft([item] for item in batch)  # one by one, to know by which
                idle.append(worker)


def batches(launches: Sequence[Launch]) -> Iterator[list[Launch]]:
    """Neighbours of one target, which share a run of the disassembler."""
    for _, group in groupby(launches, key=lambda item: item.target):
        items = list(group)
        yield from (items[start : start + BATCH] for start in range(0, len(items), BATCH))


class Worker:
    """One process that compiles."""

    def __init__(self, stack: ExitStack) -> None:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.pool = stack.enter_context(pool)

    def submit(self, batch: list[Launch]) -> Future[list[Measured]]:
        return self.pool.submit(compile_launches, batch)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Each one that is compiled once, with the rows of all its equals."""
    found: dict[tuple[object, ...], Launch] = {}
    for item in launches:
        known = found.setdefault(item.identity(), item)
        if not item.rows <= known.rows:
            found[item.identity()] = replace(known, rows=known.rows | item.rows)
    return list(found.values())


def heaviest(launches: Sequence[Launch]) -> list[Launch]:
    """Those that no other one covers (:meth:`Launch.covers`), and of every row its widest tile; in order."""
    groups: dict[object, list[Launch]] = {}
    for item in launches:
        kept = groups.setdefault(item.group(), [])
        if not any(other.covers(item) for other in kept):
            kept[:] = [other for other in kept if not item.covers(other)] + [item]
    chosen = [item for kept in groups.values() for item in kept]
    tiles = {item.tile() for item in chosen}
    for row in sorted({(item.target, row) for item in launches for row in item.rows}):
        of_row = [item for item in launches if item.target == row[0] and row[1] in item.rows]
        widest = max(map(Launch.rank_tile, of_row))
        of_row = [item for item in of_row if item.rank_tile() == widest]
        if tiles.isdisjoint(item.tile() for item in of_row):
            # A row that differs from another one in its rank tile alone is compiled with its own.
            most = next(a for a in of_row if not any(b.covers(a) and not a.covers(b) for b in of_row))
            chosen.append(most)
            tiles.add(most.tile())
    places = {id(item) for item in chosen}
    return [item for item in launches if id(item) in places]


def row_text(item: Launch, measured: Measured) -> str:
    limit = TARGETS[item.target].shared_limit
    cores = " ".join(f"{name}:{count}" for name, count in sorted(measured.tensor_core.items())) or "-"
    spills = f"{measured.spill_stores}/{measured.spill_loads}"
    shared = f"{measured.shared}/{limit}"
    name = f"{item.target:8}{item.kernel.name:16}{item.label():52}"
    loop = str(measured.loop) if measured.loop.total else "-"
    return f"{name}{measured.registers:5}{spills:>8}{shared:>15}  {cores:18} {measured.whole!s:28} {loop}"


def summary(results: list[tuple[Launch, Measured]]) -> Iterator[str]:
    """The largest registers and shared memory of each kernel on each target."""
    for target in TARGETS:
        for name in KERNELS:
            found = [m for item, m in results if (item.target, item.kernel.name) == (target, name)]
            if found:
                spills = sum(measured.spill_stores + measured.spill_loads for measured in found)
                yield (
                    f"{target:8}{name:16}{len(found):4} compiled, at most "
                    f"{max(m.registers for m in found):3} registers, {max(m.shared for m in found):6} of "
                    f"{TARGETS[target].shared_limit} bytes shared, {spills} bytes spilled"
                )


def parser() -> argparse.ArgumentParser:
    """The options of this suite."""
    result = Parser(
        "codegen", "Compile every shipped kernel configuration, without a GPU, and read the machine code."
    )
    families = [family.name for family in FAMILIES]
    result.add_argument("--target", action="append", choices=list(TARGETS), help="repeatable; default all")
    result.add_argument("--family", action="append", choices=families, help="repeatable; default all")
    result.add_argument("--kernel", action="append", choices=KERNELS, help="repeatable; default all")
    result.add_argument("--quick", action="store_true", help="default cases only: what CI compiles")
    result.add_argument("--list", action="store_true", help="say what would be compiled, and how many")
    result.add_argument("--every", action="store_true", help="those that a heavier one covers too")
    result.add_argument("--json", type=Path, metavar="PATH", help="also write every row here")
    result.add_argument("--workers", type=int, default=2, help="compiler processes (default 2)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what the options ask for; 1 if anything is wrong with it."""
    options = parser().parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        # Kernels decorated for the interpreter cannot be compiled, and they are decorated on import.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        words = [sys.executable, "-m", "bench.codegen", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(words, env=environment, check=False).returncode

    launches: list[Launch] = []
    problems: list[str] = [] if options.family else unclaimed()
    families = [family for family in FAMILIES if family.name in (options.family or [family.name])]
    for target in options.target or list(TARGETS):
        for family in (entry for entry in families if target in entry.targets):
            found = record(target, family, quick=options.quick)
            launches += [item for item in found.launches if item.kernel.name in (options.kernel or KERNELS)]
            problems += unreached(target, family, found, quick=options.quick)
    targets = list(TARGETS)
    selected = distinct(launches)
    if not options.every and not options.quick:
        selected = heaviest(selected)
    ordered = sorted(selected, key=lambda item: (targets.index(item.target), item.kernel.name))
    if options.list:
        print(*(f"{item.target:8}{item.kernel.name:18}{item.label()}" for item in ordered), sep="\n")
        print(*(f"FAULT {problem}" for problem in problems), sep="\n")
        print(f"{len(ordered)} of {len(distinct(launches))} to compile, {len(problems)} faults")
        return 1 if problems else 0
    print(
        f"{'target':8}{'kernel':16}{'configuration':52}{'regs':>5}{'spills':>8}{'shared':>15}  "
        f"{'tensor cores':18} {'whole':28} main loop"
    )
    results: list[tuple[Launch, Measured]] = []
    with tempfile.TemporaryDirectory() as cache:
        # What is read is compiled now, and nothing stays behind.
        os.environ["TRITON_CACHE_DIR"] = cache
        for count, (item, measured) in enumerate(compile_all(ordered, options.workers), start=1):
            results.append((item, measured))
            wrong = faults(item, measured)
            problems += [f"{item.target} {item.kernel.name} {item.label()}: {fault}" for fault in wrong]
            print(f"{row_text(item, measured)}{'  FAULT' if wrong else ''}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{count}/{len(ordered)}", end="\r", file=sys.stderr)
    print(*summary(results), *(f"FAULT {problem}" for problem in problems), sep="\n")
    print(f"{len(results)} compiled, {len(problems)} faults")
    if options.json:
        rows = [{**asdict(item), **asdict(measured), "label": item.label()} for item, measured in results]
        options.json.write_text(json.dumps(rows, indent=1, default=str))
    return 1 if problems or not results else 0
