"""Suite `layers`: a linear, q/k/v and a gated MLP with LoRA or DoRA, forward and backward, beside others.

The input needs a gradient, as it does everywhere above the first block. The adapters count as written between
two calls, as an optimiser step would do: DoRA's norm is computed in every one. Blocks faster than a few
milliseconds are called several times a round, and the mean is one sample. A shape is tokens x in x out: for
q/k/v `out` is q's (k and v have a quarter), for the MLP it is the inner width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bench import clock, modelled, options, parity, report, single
from bench.adapter import Adapter
from bench.blocks import BLOCKS, Problem, Shape
from bench.clock import Stopwatch
from bench.measure import Phases, Samples, Spread, interleave, pairwise_ratio
from bench.models import DTYPES
from bench.records import method_of
from bench.single import Layer

MIN_SECONDS = 5e-3  # of calls that make one sample
METHODS = ("lora", "dora")
DEFAULT_PEERS = tuple(name for name in single.PEERS if name != "peft-compiled")  # compiles for minutes

SHAPES = {
    "linear": ("512x1024x1024", "1024x2048x2048", "256x4096x4096", "2048x1024x4096"),
    "qkv": ("512x1024x1024", "256x4096x4096"),
    "mlp": ("512x1024x2816", "256x2048x5632"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A block of a shape with its dtype and rank."""

    block: str
    shape: Shape
    dtype: str
    rank: int
    dropout: float

    @property
    def title(self) -> str:
        """As printed above its table."""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{self.block} {self.shape} (tokens x in x out), {self.dtype}, r={self.rank}{dropout}"

    def problem(self, device: torch.device) -> Problem:
        """What the contenders are made of."""
        return Problem(block=self.block, shape=self.shape, dtype=DTYPES[self.dtype], device=device)


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("layers", __doc__)
    add = arguments.add_argument
    add("--blocks", choices=BLOCKS, nargs="+", default=list(BLOCKS), help="default all of linear, qkv, mlp")
    add("--shapes", type=Shape.parse, nargs="+", metavar="MxKxN",
        help="tokens x in x out for every block, instead of "
        + "; ".join(f"{' '.join(shapes)} ({block})" for block, shapes in SHAPES.items()))  # fmt: skip
    add("--ranks", type=options.positive, nargs="+", default=[16, 64], help="default 16 and 64")
    add("--dtypes", choices=DTYPES, nargs="+", default=["bfloat16", "float32"], help="default both")
    add("--dropout", type=options.probability, nargs="+", default=[0.0], help="default 0")
    add("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="default both")
    add("--peers", choices=("none", "all", *single.PEERS), nargs="+", metavar="NAME",
        help=f"beside PEFT: of {', '.join(single.PEERS)}; none; all. Default: all but peft-compiled; "
        "one that cannot run here is listed with its reason")  # fmt: skip
    add("--modelled", choices=modelled.GPUS, help="add the time of this GPU's roofline for forward and "
        "backward, from the formulas of `bench.peers`: a model, no measurement; linears in 16 bits "
        "only")  # fmt: skip
    options.add_timing(arguments, rounds=10)
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a contender failed its parity check or broke."""
    commands = parser()
    arguments = commands.parse_args(argv)
    absent = {
        f"{peer}-{method}": reason
        for method in arguments.methods
        for peer in chosen_peers(arguments.peers)
        if (reason := single.missing(peer, method, arguments.device))
    }
    for peer in arguments.peers or ():
        reasons = [absent.get(f"{peer}-{method}") for method in arguments.methods]
        if all(reasons):
            commands.error(f"argument --peers: {peer} cannot run here: {reasons[0]}")
    facts = report.begin("layers", arguments)
    cases = [
        Case(block=block, shape=shape, dtype=dtype, rank=rank, dropout=dropout)
        for dtype in arguments.dtypes for dropout in arguments.dropout for block in arguments.blocks
        for shape in arguments.shapes or map(Shape.parse, SHAPES[block]) for rank in arguments.ranks
    ]  # fmt: skip
    for name, reason in absent.items():
        report.console().print(f"{name} cannot run here: {reason}", soft_wrap=True)
    sides = [*single.OURS, *chosen_peers(arguments.peers)]
    names = [f"{side}-{method}" for method in arguments.methods for side in sides]
    names = [name for name in names if name not in absent]
    records: list[report.Record] = [
        {"contender": name, "blocked": f"cannot run here: {reason}"} for name, reason in absent.items()
    ]
    all_samples: list[tuple[Case, Samples]] = []
    failed = False
    for case in cases:
        layers, blocked = line_up(case, names, arguments.device)
        samples = measure(case.title, layers, arguments.rounds, arguments.warmup)
        models = modelled.seconds(arguments.modelled, case.block, case.shape, case.dtype, samples)
        show(case, samples, blocked, models, arguments.modelled)
        all_samples.append((case, samples))
        failed = failed or bool(blocked)
        for name in (*layers, *blocked):
            records.append(
                {"block": case.block, "shape": str(case.shape), "dtype": case.dtype, "rank": case.rank,
                 "dropout": case.dropout, "contender": name, "seconds": samples.get(name, {}),
                 "modelled": {arguments.modelled: models[name]} if name in models else None,
                 "blocked": blocked.get(name)}
            )  # fmt: skip
    summarise(all_samples, names)
    if arguments.json:
        report.write_json(arguments.json, report.command_line("layers", argv), facts, records)
    return int(failed)


def chosen_peers(words: Sequence[str] | None) -> list[str]:
    """The sides beside fastpeft's and PEFT's that the words name."""
    if words is None:
        return list(DEFAULT_PEERS)
    if "all" in words:
        return list(single.PEERS)
    return [word for word in words if word != "none"]


def line_up(
    case: Case, names: Sequence[str], device: torch.device
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Blocks that passed the parity gate, and the reasons of those that did not."""
    problem = case.problem(device)
    layers, blocked = {"frozen": single.frozen(problem)}, {}
    builders = single.OURS | single.PEERS
    for name in names:
        side, _, method = name.rpartition("-")
        adapter = Adapter(rank=case.rank, dora=method == "dora", dropout=case.dropout)
        try:
            layer = builders[side](problem, adapter)
            if side != "peft":
                # Without dropout: the two sides' masks differ.
                plain = replace(adapter, dropout=0.0)
                checked = builders[side](problem, plain) if case.dropout else layer
                reason = parity.failure(single.check(checked, problem, plain))
                if reason:
                    blocked[name] = f"parity: {reason}"
                    continue
            layers[name] = layer
        except Exception as error:  # a contender that cannot run is a row, with its reason
            blocked[name] = f"cannot run: {type(error).__name__}: {error}".splitlines()[0]
    return layers, blocked


def measure(title: str, layers: dict[str, Layer], rounds: int, warmup: int) -> Samples:
    """Time the layers in turns."""
    with report.progress(title, len(layers) * (warmup + rounds)) as advance:
        runs: dict[str, Callable[[], Phases]] = {name: timed(layer) for name, layer in layers.items()}
        return interleave(runs, rounds=rounds, warmup=warmup, on_run=advance)


def timed(layer: Layer) -> Callable[[], Phases]:
    """Mean of some forwards and backwards of `layer`, each from fresh gradients."""
    repeats = 1
    device = layer.x.device

    def run() -> Phases:
        nonlocal repeats
        # On a GPU all are queued before the first is read: the queue hides what launching costs.
        watches = [once() for _ in range(repeats)]
        mean = clock.mean([watch.phases("both") for watch in watches])
        # Set by every round for the next one, so in the warm-up before the first that counts.
        repeats = max(1, min(100, round(MIN_SECONDS / mean["both"])))
        return mean

    def once() -> Stopwatch:
        layer.clear()
        clock.flush_cache(device)
        watch = Stopwatch(device)
        outputs = layer.forward()
        watch.mark("forward")
        layer.backward(outputs)
        watch.mark("backward")
        return watch

    return run


def summarise(all_samples: Sequence[tuple[Case, Samples]], names: Sequence[str]) -> None:
    """Print, by block, dtype, dropout and contender, the geometric mean and the worst of shapes and ranks."""
    groups: dict[tuple[str, str, float, str], list[tuple[float, float]]] = {}
    for case, samples in all_samples:
        for name in names:
            ours, peer = samples.get(name), samples.get(f"peft-{method_of(name)}")
            if ours and peer and ours is not peer:
                speed = pairwise_ratio(peer["both"], ours["both"]).median
                cost = pairwise_ratio(ours["both"], samples["frozen"]["both"]).median
                groups.setdefault((name, case.block, case.dropout, case.dtype), []).append((speed, cost))
    rows = [
        [
            f"{name}, {block}, {dtype}" + (f", dropout {dropout:g}" if dropout else ""),
            str(len(pairs)),
            f"{geometric_mean([speed for speed, _ in pairs]):.2f}",
            f"{min(speed for speed, _ in pairs):.2f}",
            f"{max(cost for _, cost in pairs):.2f}",
        ]
        for (name, block, dropout, dtype), pairs in groups.items()
    ]
    columns = ("contender", "cases", "speed / PEFT's, geometric mean", "least", "time / frozen, most")
    report.print_table("forward and backward, all cases", columns, rows)


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios, as ratios are averaged."""
    return math.exp(sum(map(math.log, values)) / len(values))


def show(
    case: Case, samples: Samples, blocked: dict[str, str], models: dict[str, float], gpu: str | None
) -> None:
    """Print one case's table."""

    def over(name: str, other: str, phase: str) -> str:
        if other not in samples:
            return "-"
        return report.ratio(pairwise_ratio(samples[name][phase], samples[other][phase]))

    phases = ("forward", "backward", "both")
    rows = []
    for name, found in samples.items():
        method = method_of(name)
        peer = f"peft-{method}"
        rows.append([
            name,
            *(report.milliseconds(Spread.of(found[phase])) for phase in phases),
            *((over(peer, name, phase) if method and peer in samples else "-") for phase in phases),
            over(name, "frozen", "both"),
            *([f"{1e6 * models[name]:.0f}" if name in models else "-"] if gpu else []),
        ])  # fmt: skip
    columns = ["contender", "fwd ms", "bwd ms", "both ms", "fwd speed / PEFT's", "bwd speed / PEFT's",
               "both speed / PEFT's", "both time / frozen"]  # fmt: skip
    if gpu:
        columns.append(f"modelled us, {modelled.GPUS[gpu]}")
    report.print_table(case.title, columns, rows, "medians ± half the interquartile range")
    for name, reason in blocked.items():
        report.console().print(f"[bold red]{name} is not timed[/bold red]: {reason}", soft_wrap=True)
