"""Tables, progress and the JSON document, the same for every suite."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench import machine
from bench.measure import Spread
from bench.options import Parser, new_file, positive

__all__ = ["Parser", "new_file", "positive"]  # where `traffic` takes them from

Record = dict[str, object]
"""One row of results as it goes into the JSON file."""

PLAIN_WIDTH = 150  # columns when stdout is a file or a pipe, where rich would assume 80 and wrap


def console(*, error: bool = False) -> Console:
    """A console that writes plain text of a fixed width when it is not a terminal."""
    stream = sys.stderr if error else sys.stdout
    return Console(stderr=error, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False)


def begin(suite: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Set the threads, print the machine, and return its facts."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = machine.facts(arguments.device)
    out = console()
    out.print(f"[bold]bench {suite}[/bold]")
    out.print("; ".join(f"{key}: {value}" for key, value in facts.items()), soft_wrap=True)
    return facts


def command_line(suite: str, argv: Sequence[str]) -> str:
    """The command that makes the same results, less where it writes them."""
    words = list(argv)
    while "--json" in words:
        place = words.index("--json")
        del words[place : place + 2]
    return " ".join(["python -m bench", suite, *words])


def write_json(path: Path, command: str, facts: dict[str, str], rows: list[Record]) -> None:
    """Write results with the machine and the command that made them."""
    document = {"command": command, "machine": facts, "results": rows}
    path.write_text(json.dumps(document, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> None:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def milliseconds(spread: Spread) -> str:
    """Median and half the interquartile range, in milliseconds."""
    median, half = 1e3 * spread.median, 1e3 * spread.half_range
    digits = 1 if median < 100 else 0
    return f"{median:.{digits}f} ±{half:.{digits}f}"


def ratio(spread: Spread | None) -> str:
    """Median and half the interquartile range of a ratio, or a dash."""
    return "-" if spread is None else f"{spread.median:.2f} ±{spread.half_range:.2f}"


def mebibytes(count: int) -> str:
    """Bytes in MiB with two decimals."""
    return f"{count / 2**20:.2f}"


class Steps(Protocol):
    """What a suite tells its progress display."""

    def __call__(self, text: str) -> None:
        """One more unit of work begins, described by `text`."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Steps]:
    """A bar with the time left on a terminal, about ten lines otherwise; on stderr, away from the tables."""
    err = console(error=True)
    if not err.is_terminal:
        done = 0

        def plain(text: str) -> None:
            nonlocal done
            if done * 10 // total != (done - 1) * 10 // total:
                err.print(f"{title}: {done}/{total} {text}")
            done += 1

        yield plain
        return
    fields = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*fields, console=err, transient=True) as bar:
        task = bar.add_task(title, total=total)
        started = False

        def advance(text: str) -> None:
            nonlocal started
            bar.update(task, description=f"{title}: {text}", advance=1 if started else 0)
            started = True

        yield advance
