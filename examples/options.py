"""The command line of examples/finetune.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import dtypes

ADAPTERS = ("lora", "dora", "ist")  # the others train the model's own layers
METHODS = (*ADAPTERS, "lisa", "badam", "topk")
SCHEDULED = METHODS[2:]
LEARNING_RATES = {True: 2e-3, False: 1e-4}  # of adapters, of a model's own weights

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line said; see `parse` for what each means."""

    model: Path | None
    text: Path | None
    prompt: str | None
    method: str
    rank: int
    alpha: float
    lr: float
    layers: int
    period: int
    dropout: float
    steps: int
    batch: int
    sequence: int
    seed: int
    dtype: str
    out: Path
    cache: Path


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not the "None" of options whose help says what their absence means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read the command line; wrong input ends the program with one line and exit code 2."""
    parser = _OneLineParser(
        prog="finetune.py",
        description="Fine-tune a causal language model with fastpeft and see what it learned. Without "
        "options: SmolLM2-135M learns Shakespeare, and is judged on two plays it has not trained on.",
        formatter_class=_Help,
    )
    data = parser.add_argument_group("model and text")
    data.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="folder of any transformers causal language model with its tokenizer; without it "
        "SmolLM2-135M-Instruct, converted once into the cache",
    )
    data.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to learn, its last tenth held out; without it Shakespeare's plays, Macbeth and "
        "The Tempest held out",
    )
    data.add_argument(
        "--prompt", metavar="TEXT", help="what the two samples start from; without it one fit for the text"
    )
    data.add_argument("--dtype", choices=dtypes.DTYPES, help=dtypes.HELP)

    parser.add_argument(
        "--method",
        choices=METHODS,
        default="lora",
        help="lora and dora train adapters, ist a few of them at a time; lisa, badam and topk train a few of "
        "the model's own layers at a time",
    )
    sparse = parser.add_argument_group("layers (ist, lisa, badam, topk)")
    sparse.add_argument(
        "--layers", type=_whole(1), default=2, metavar="N", help="layers that train at a time; badam: one"
    )
    sparse.add_argument(
        "--period", type=_whole(1), default=5, metavar="N", help="steps from one choice of layers to the next"
    )

    adapter = parser.add_argument_group("adapter (lora, dora, ist)")
    adapter.add_argument("--rank", type=_whole(1), default=16, metavar="R", help="rank of the adapters")
    adapter.add_argument(
        "--alpha", type=_number(0, math.inf), default=32, metavar="A", help="the adapters' scale is A / R"
    )
    adapter.add_argument(
        "--dropout", type=_number(0, 1), default=0.0, metavar="P", help="dropout before the adapters"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=_whole(1), default=60, metavar="N", help="optimiser steps")
    training.add_argument("--batch", type=_whole(1), default=4, metavar="N", help="sequences per step")
    training.add_argument("--sequence", type=_whole(2), default=128, metavar="N", help="tokens per sequence")
    training.add_argument(
        "--lr",
        type=_number(0, math.inf),
        metavar="LR",
        help="highest learning rate; without it 2e-3 for adapters, 1e-4 for the model's own layers",
    )
    training.add_argument(
        "--seed", type=_whole(0), default=0, metavar="N", help="equal seeds repeat a run on the same machine"
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--out",
        type=Path,
        default=Path("runs/shakespeare"),
        metavar="DIR",
        help="gets the adapter, the loss plot and the figures",
    )
    files.add_argument(
        "--cache",
        type=Path,
        default=ROOT / ".cache",
        metavar="DIR",
        help="keeps the converted model and the downloaded plays",
    )
    given = vars(parser.parse_args(argv))
    if given["lr"] is None:
        given["lr"] = LEARNING_RATES[given["method"] in ADAPTERS]
    if given["dtype"] is None:
        given["dtype"] = dtypes.quickest()
    return Options(**given)


def _whole(least: int) -> Callable[[str], int]:
    """Make a reader of whole numbers from `least` up."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return read


def _number(least: float, below: float) -> Callable[[str], float]:
    """Make a reader of numbers from `least` to below `below`; without an upper end, above `least`."""
    unbounded = math.isinf(below)

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = least < value < below if unbounded else least <= value < below
        if not inside:
            wanted = f"above {least:g}" if unbounded else f"from {least:g} to below {below:g}"
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, got {text!r}")
        return value

    return read
