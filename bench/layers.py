"""Suite `layers`: one linear with LoRA or DoRA, forward and backward, beside PEFT and the frozen linear.

The input needs a gradient, as it does everywhere above the first block.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from bench import parity, report, single
from bench.contenders import Adapter
from bench.measure import Phases, Samples, Spread, interleave, pairwise_ratio
from bench.models import DTYPES
from bench.single import Layer, Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A shape with its dtype and rank."""

    shape: Shape
    dtype: str
    rank: int

    @property
    def title(self) -> str:
        """As printed above its table."""
        return f"{self.shape} (tokens x in x out), {self.dtype}, r={self.rank}"


def _cases(dtype: str, *rows: tuple[str, int]) -> list[Case]:
    return [Case(shape=Shape.parse(shape), dtype=dtype, rank=rank) for shape, rank in rows]


# The CPU list that the project's first measurements were made on.
DEFAULT = [
    *_cases("bfloat16", ("1024x2048x2048", 16), ("1024x2048x2048", 64), ("256x4096x4096", 16)),
    *_cases("bfloat16", ("2048x1024x4096", 16)),
    *_cases("float32", ("1024x2048x2048", 16), ("2048x1024x4096", 16)),
]


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = argparse.ArgumentParser(prog="python -m bench layers", description=__doc__)
    add = arguments.add_argument
    add(
        "--shapes",
        type=Shape.parse,
        nargs="+",
        metavar="MxKxN",
        help="tokens x in x out, instead of the list",
    )
    add("--ranks", type=report.positive, nargs="+", default=[16], help="ranks of --shapes (default 16)")
    add("--dtypes", choices=DTYPES, nargs="+", default=["bfloat16"], help="of --shapes (default bfloat16)")
    add("--methods", choices=("lora", "dora"), nargs="+", default=["lora", "dora"], help="default both")
    report.add_timing(arguments, rounds=10)
    report.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a contender was blocked."""
    arguments = parser().parse_args(argv)
    facts = report.begin("layers", arguments)
    cases = DEFAULT
    if arguments.shapes:
        cases = [Case(shape=shape, dtype=dtype, rank=rank)
                 for dtype in arguments.dtypes for shape in arguments.shapes
                 for rank in arguments.ranks]  # fmt: skip
    records: list[report.Record] = []
    any_blocked = False
    for case in cases:
        layers, blocked = line_up(case, arguments.methods)
        total = len(layers) * (arguments.warmup + arguments.rounds)
        with report.progress(case.title, total) as advance:
            runs: dict[str, Callable[[], Phases]] = {name: timed(layer) for name, layer in layers.items()}
            samples = interleave(runs, rounds=arguments.rounds, warmup=arguments.warmup, on_run=advance)
        show(case, samples, blocked)
        any_blocked = any_blocked or bool(blocked)
        for name in (*layers, *blocked):
            records.append(
                {"shape": str(case.shape), "dtype": case.dtype, "rank": case.rank, "contender": name,
                 "seconds": samples.get(name, {}), "blocked": blocked.get(name)}
            )  # fmt: skip
    if arguments.json:
        report.write_json(arguments.json, report.command_line("layers", argv), facts, records)
    return int(any_blocked)


def line_up(case: Case, methods: Sequence[str]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers that passed the parity gate, and the reasons of those that did not."""
    dtype = DTYPES[case.dtype]
    layers, blocked = {"frozen": single.frozen(case.shape, dtype)}, {}
    for method in methods:
        adapter = Adapter(rank=case.rank, dora=method == "dora")
        for side, builder in single.SIDES.items():
            name = f"{side}-{method}"
            try:
                layer = builder(case.shape, dtype, adapter)
                if side != "peft":
                    reason = parity.failure(single.check(layer, case.shape, dtype, adapter))
                    if reason:
                        blocked[name] = f"parity: {reason}"
                        continue
                layers[name] = layer
            except Exception as error:  # a contender that cannot run is a row, with its reason
                blocked[name] = f"cannot run: {type(error).__name__}: {error}".splitlines()[0]
    return layers, blocked


def timed(layer: Layer) -> Callable[[], Phases]:
    """One forward and one backward of `layer`, from fresh gradients."""

    def run() -> Phases:
        layer.clear()
        start = perf_counter()
        y = layer.call(layer.x)
        middle = perf_counter()
        torch.autograd.backward(y, layer.dy)
        end = perf_counter()
        return {"both": end - start, "forward": middle - start, "backward": end - middle}

    return run


def show(case: Case, samples: Samples, blocked: dict[str, str]) -> None:
    """Print one case's table."""

    def over(name: str, other: str, phase: str) -> str:
        if other not in samples:
            return "-"
        return report.ratio(pairwise_ratio(samples[name][phase], samples[other][phase]))

    rows = []
    for name, phases in samples.items():
        method = name.partition("-")[2]
        peer = f"peft-{method}"
        rows.append([
            name,
            *(report.milliseconds(Spread.of(phases[phase])) for phase in ("forward", "backward", "both")),
            *((over(peer, name, phase) if method and peer in samples else "-")
              for phase in ("forward", "backward", "both")),
            over(name, "frozen", "both"),
        ])  # fmt: skip
    columns = ("contender", "fwd ms", "bwd ms", "both ms", "fwd speed / PEFT's", "bwd speed / PEFT's",
               "both speed / PEFT's", "both time / frozen")  # fmt: skip
    report.print_table(case.title, columns, rows, "medians ± half the interquartile range")
    for name, reason in blocked.items():
        report.console().print(f"[bold red]{name} is not timed[/bold red]: {reason}", soft_wrap=True)
