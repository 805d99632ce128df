"""Suite `self-check`: one implementation against itself, twice built and timed like two contenders.

Whatever the ratio is besides 1.00, the benchmark put there: the order of the runs, where their memory lies,
the clock. On a quiet machine it is 1.00 within 0.02; beyond that the exit status is 1, and the ratios of the
other suites are to be read with as much doubt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench import layers, options, report, single
from bench.adapter import Adapter
from bench.blocks import Problem, Shape
from bench.measure import Spread, pairwise_ratio
from bench.models import DTYPES

ALLOWED = 0.02


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("self-check", __doc__)
    add = arguments.add_argument
    add("--shape", type=Shape.parse, default=Shape(M=512, K=1024, N=1024), metavar="MxKxN",
        help="of a linear, tokens x in x out (default 512x1024x1024)")  # fmt: skip
    add("--rank", type=options.positive, default=16, help="adapter rank (default 16)")
    add("--dtype", choices=DTYPES, default="float32", help="default float32")
    add("--side", choices=("fastpeft", "peft"), default="fastpeft", help="whose (default fastpeft)")
    options.add_timing(arguments, rounds=40, warmup=5)
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a ratio is not 1.00 within 0.02."""
    arguments = parser().parse_args(argv)
    facts = report.begin("self-check", arguments)
    problem = Problem(
        block="linear", shape=arguments.shape, dtype=DTYPES[arguments.dtype], device=arguments.device
    )
    rows, records, beyond = [], [], False
    for dora in (False, True):
        adapter = Adapter(rank=arguments.rank, dora=dora)
        name = f"{arguments.side}-{adapter.method}"
        built = {label: single.OURS[arguments.side](problem, adapter) for label in (name, f"{name} again")}
        samples = layers.measure(name, built, arguments.rounds, arguments.warmup)
        for phase in ("forward", "backward", "both"):
            ratio = pairwise_ratio(samples[f"{name} again"][phase], samples[name][phase])
            off = abs(ratio.median - 1.0) > ALLOWED
            beyond = beyond or (off and phase == "both")
            first, second = (report.milliseconds(Spread.of(found[phase])) for found in samples.values())
            rows.append([f"{name}, {phase}", first, second, f"{ratio.median:.3f} ±{ratio.half_range:.3f}"])
        for label, seconds in samples.items():
            records.append(
                {"block": "linear", "shape": str(arguments.shape), "dtype": arguments.dtype,
                 "rank": arguments.rank, "contender": label, "peer": name, "seconds": seconds}
            )  # fmt: skip
    columns = ("contender", "ms", "again, ms", "again / first")
    title = f"the same twice, linear {arguments.shape}, {arguments.dtype}, r={arguments.rank}"
    report.print_table(title, columns, rows, "medians ± half the interquartile range, of ratios in pairs")
    verdict = "NOT 1.00 within 0.02: the machine is not quiet enough" if beyond else "1.00 within 0.02"
    report.console().print(f"forward and backward: {verdict}")
    if arguments.json:
        report.write_json(arguments.json, report.command_line("self-check", argv), facts, records)
    return int(beyond)
