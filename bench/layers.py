"""Suite `layers`: one linear with LoRA or DoRA, forward and backward, beside PEFT and the frozen linear.

The input needs a gradient, as it does everywhere above the first block. The adapters count as written between
two calls, as an optimiser step would do: DoRA's norm is computed in every one. Layers faster than a few
milliseconds are called several times a round, and the mean is one sample.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from bench import parity, report, single
from bench.contenders import Adapter
from bench.measure import Phases, Samples, Spread, interleave, pairwise_ratio
from bench.models import DTYPES
from bench.single import Layer, Shape

MIN_SECONDS = 5e-3  # of calls that make one sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A shape with its dtype and rank."""

    shape: Shape
    dtype: str
    rank: int
    dropout: float

    @property
    def title(self) -> str:
        """As printed above its table."""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.shape} (tokens x in x out), {self.dtype}, r={self.rank}{dropout}"


SHAPES = [
    Shape.parse(text) for text in ("512x1024x1024", "1024x2048x2048", "256x4096x4096", "2048x1024x4096")
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
        default=SHAPES,
        help=f"tokens x in x out (default {' '.join(map(str, SHAPES))})",
    )
    add("--ranks", type=report.positive, nargs="+", default=[16, 64], help="default 16 and 64")
    add("--dtypes", choices=DTYPES, nargs="+", default=["bfloat16", "float32"], help="default both")
    add("--dropout", type=float, nargs="+", default=[0.0], help="default 0")
    add("--methods", choices=("lora", "dora"), nargs="+", default=["lora", "dora"], help="default both")
    report.add_timing(arguments, rounds=10)
    report.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a contender was blocked."""
    arguments = parser().parse_args(argv)
    facts = report.begin("layers", arguments)
    cases = [Case(shape=shape, dtype=dtype, rank=rank, dropout=dropout)
             for dtype in arguments.dtypes for dropout in arguments.dropout for shape in arguments.shapes
             for rank in arguments.ranks]  # fmt: skip
    records: list[report.Record] = []
    all_samples: list[tuple[Case, Samples]] = []
    any_blocked = False
    for case in cases:
        layers, blocked = line_up(case, arguments.methods)
        total = len(layers) * (arguments.warmup + arguments.rounds)
        with report.progress(case.title, total) as advance:
            runs: dict[str, Callable[[], Phases]] = {name: timed(layer) for name, layer in layers.items()}
            samples = interleave(runs, rounds=arguments.rounds, warmup=arguments.warmup, on_run=advance)
        show(case, samples, blocked)
        all_samples.append((case, samples))
        any_blocked = any_blocked or bool(blocked)
        for name in (*layers, *blocked):
            records.append(
                {"shape": str(case.shape), "dtype": case.dtype, "rank": case.rank, "dropout": case.dropout,
                 "contender": name, "seconds": samples.get(name, {}), "blocked": blocked.get(name)}
            )  # fmt: skip
    summarise(all_samples)
    if arguments.json:
        report.write_json(arguments.json, report.command_line("layers", argv), facts, records)
    return int(any_blocked)


def line_up(case: Case, methods: Sequence[str]) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers that passed the parity gate, and the reasons of those that did not."""
    dtype = DTYPES[case.dtype]
    layers, blocked = {"frozen": single.frozen(case.shape, dtype)}, {}
    for method in methods:
        adapter = Adapter(rank=case.rank, dora=method == "dora", dropout=case.dropout)
        for side, builder in single.SIDES.items():
            name = f"{side}-{method}"
            try:
                layer = builder(case.shape, dtype, adapter)
                if side != "peft":
                    # Without dropout: the two sides' masks differ.
                    plain = replace(adapter, dropout=0.0)
                    checked = builder(case.shape, dtype, plain) if case.dropout else layer
                    reason = parity.failure(single.check(checked, case.shape, dtype, plain))
                    if reason:
                        blocked[name] = f"parity: {reason}"
                        continue
                layers[name] = layer
            except Exception as error:  # a contender that cannot run is a row, with its reason
                blocked[name] = f"cannot run: {type(error).__name__}: {error}".splitlines()[0]
    return layers, blocked


def timed(layer: Layer) -> Callable[[], Phases]:
    """Mean of some forwards and backwards of `layer`, each from fresh gradients."""
    repeats = 1

    def run() -> Phases:
        nonlocal repeats
        runs = [once() for _ in range(repeats)]
        mean = {phase: sum(run[phase] for run in runs) / repeats for phase in runs[0]}
        # Set by every round for the next one, so in the warm-up before the first that counts.
        repeats = max(1, min(100, round(MIN_SECONDS / mean["both"])))
        return mean

    def once() -> Phases:
        layer.clear()
        start = perf_counter()
        y = layer.call(layer.x)
        middle = perf_counter()
        torch.autograd.backward(y, layer.dy)
        end = perf_counter()
        return {"both": end - start, "forward": middle - start, "backward": end - middle}

    return run


def summarise(all_samples: Sequence[tuple[Case, Samples]]) -> None:
    """Print, by dtype, dropout and method, the geometric mean and the worst case of all shapes and ranks."""
    groups: dict[tuple[str, float, str], list[tuple[float, float]]] = {}
    for case, samples in all_samples:
        for method in ("lora", "dora"):
            ours, peer = samples.get(f"fastpeft-{method}"), samples.get(f"peft-{method}")
            if ours and peer:
                speed = pairwise_ratio(peer["both"], ours["both"]).median
                cost = pairwise_ratio(ours["both"], samples["frozen"]["both"]).median
                groups.setdefault((case.dtype, case.dropout, method), []).append((speed, cost))
    rows = [
        [
            f"{dtype}, {method}" + (f", dropout {dropout:g}" if dropout else ""),
            str(len(pairs)),
            f"{math.exp(sum(math.log(speed) for speed, _ in pairs) / len(pairs)):.2f}",
            f"{min(speed for speed, _ in pairs):.2f}",
            f"{max(cost for _, cost in pairs):.2f}",
        ]
        for (dtype, dropout, method), pairs in groups.items()
    ]
    columns = ("fastpeft", "cases", "speed / PEFT's, geometric mean", "least", "time / frozen, most")
    report.print_table("forward and backward, all cases", columns, rows)


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
