"""Command-line options that several suites share, and parsers whose complaints are one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """Wrong use is one line on stderr and exit status 2; the options are in `--help`."""

    def __init__(self, prog: str, description: str | None, *, add_help: bool = True) -> None:
        super().__init__(
            prog=f"python -m bench {prog}".strip(),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )

    def error(self, message: str) -> NoReturn:
        """Print `message` alone."""
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, received {text}")
    return value


def probability(text: str) -> float:
    """A number from 0 to below 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, received {text}")
    return value


def device(text: str) -> torch.device:
    """A device that is here, for argparse."""
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if text.partition(":")[0] not in here:
        raise argparse.ArgumentTypeError(f"no such device here: {text}; expected one of: {', '.join(here)}")
    return torch.device(text)


def new_file(text: str) -> Path:
    """A path whose folder exists, for argparse: found wrong before the measurement, not after it."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder")
    return path


def old_file(text: str) -> Path:
    """A file that exists, for argparse."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file")
    return path


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options every suite has."""
    parser.add_argument("--threads", type=positive, help="threads torch uses (default: torch's own choice)")
    parser.add_argument(
        "--device", type=device, default=torch.device("cpu"), help="cpu (default) or cuda, where it is"
    )
    add_outputs(parser)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Where results go besides the screen. `bench.outputs` acts on them, the same for every suite."""
    add = parser.add_argument
    add("--json", type=new_file, metavar="PATH", help="also write the results to PATH as JSON")
    add("--csv", type=new_file, metavar="PATH", help="also as CSV, a line for each measure")
    add("--markdown", type=new_file, metavar="PATH", help="also as Markdown tables")
    add("--plot", type=new_file, metavar="PATH", help="also draw bars: PATH as .png and as .svg")
    add(
        "--compare", type=old_file, metavar="OLD.json", help="print each measure's ratio to an earlier file's"
    )
    add("--save", nargs="?", const="", metavar="LABEL", type=label,
        help="also write bench/results/MACHINE/SUITE-LABEL.json, of which `python -m bench readme` makes "
        "the README's figures (LABEL: model and dtype)")  # fmt: skip


def label(text: str) -> str:
    """A word for a file's name, for argparse."""
    if not all(c.isalnum() or c in "-_." for c in text):
        raise argparse.ArgumentTypeError(f"expected letters, digits, '-', '_' and '.', received {text!r}")
    return text


def add_timing(parser: argparse.ArgumentParser, *, rounds: int, warmup: int = 2) -> None:
    """The options of suites that measure time."""
    add = parser.add_argument
    add("--rounds", type=positive, default=rounds, help=f"measured rounds (default {rounds})")
    add("--warmup", type=positive, default=warmup, help=f"rounds thrown away first (default {warmup})")
