"""``python -m tests.conformance``: PEFT's own LoRA tests on accelerated models."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.conformance import snapshots, suite

KNOWN_FAILURES = Path(__file__).with_name("known_failures.txt")
# Tests that watch a function inside PEFT's own forward, which ours takes the place of: how often it forms
# W + B A of a Parameter, and in which dtype. tests/in_place/test_parameters.py has what they are for.
INSIDE_PEFTS_FORWARD = Path(__file__).with_name("inside_pefts_forward.txt")


@dataclass(frozen=True)
class Expected:
    """What a run of a file must reach: frozen from runs with PEFT 0.21.2.

    Attributes:
        passed: tests.
        fast_share: calls of our ops, of those in which an adapter had something to do.
        own_share: calls not left to PEFT, of all, those that need the base alone included.
    """

    passed: int
    fast_share: float
    own_share: float


# Passed tests, and shares a little below what was measured.
EXPECTED: dict[str, Expected] = {
    "custom_models": Expected(2722, 0.95, 0.96),
    "decoder_models": Expected(705, 0.99, 0.99),
    "encoder_decoder_models": Expected(115, 0.99, 0.99),
    "feature_extraction_models": Expected(125, 0.99, 0.99),
    "initialization": Expected(396, 0.95, 0.98),
    "low_level_api": Expected(52, 0.99, 0.99),
    "trainable_tokens": Expected(58, 0.99, 0.99),
    "lora_ga": Expected(40, 0.99, 0.99),
    "mixed": Expected(37, 0.99, 0.99),
    "lora_conversion": Expected(32, 0.99, 0.99),
    "lora_variants": Expected(26, 0.99, 0.99),
    "lorafa": Expected(10, 0.99, 0.99),
    "loraplus": Expected(4, 0.99, 0.99),
    "target_parameters": Expected(231, 0.99, 0.98),
    "tuners_utils": Expected(243, 0.0, 0.0),  # nothing of it calls a layer
}
# What CI runs, file: (parts of the names of its tests, none for all; what that must reach).
QUICK: dict[str, tuple[tuple[str, ...], Expected]] = {
    "lora_variants": ((), EXPECTED["lora_variants"]),
    "custom_models": (
        ("test_only_params_are_updated", "test_disable_adapters", "test_merge_layers"),
        Expected(395, 0.79, 0.79),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the options ask for; 1 if a test fails that does not fail without us, or too few are fast."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument(
        "--files", nargs="+", metavar="NAME", help="test_NAME.py; default: all that are frozen"
    )
    parser.add_argument("--baseline", action="store_true", help="without acceleration: what fails anyway")
    parser.add_argument("--quick", action="store_true", help="the part that CI runs")
    parser.add_argument("--select", nargs="+", default=[], metavar="PART", help="of the names of the tests")
    parser.add_argument("--cache", type=Path, default=suite.ROOT / ".cache" / "conformance")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log", type=Path, help="append pytest's whole output to this file")
    options = parser.parse_args(argv)
    start = time.monotonic()
    files, expected = _chosen(options.files, options.quick, options.select)
    folder, home = suite.fetch(options.cache), options.cache / "hf"
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar for each model
        snapshots.fill(home)
    results = suite.run(
        folder,
        home,
        files,
        accelerated=not options.baseline,
        workers=options.workers,
        log=options.log,
    )
    known = {test for file in (KNOWN_FAILURES, INSIDE_PEFTS_FORWARD) for test in file.read_text().split()}
    console = Console(width=None if sys.stdout.isatty() else 120)

    def say(*lines: str) -> None:
        console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)

    console.print(_table(results, known), soft_wrap=True)
    tests, seconds = sum(result.passed for result in results.values()), time.monotonic() - start
    say(
        f"{tests:,} tests of {len(results)} files passed in {seconds:.0f} s, {options.workers} worker(s), "
        "preparation included"
    )
    if options.baseline:
        say(*(test for result in results.values() for test in result.failed))
        return 0
    reasons = sum((result.reasons for result in results.values()), Counter[str]())
    say(*(f"{count:7,} calls left to PEFT: {reason}" for reason, count in reasons.most_common()))
    problems = list(shortfalls(results, expected, known))
    say(*problems)
    return 1 if problems else 0


def _chosen(
    names: Sequence[str] | None, quick: bool, select: Sequence[str]
) -> tuple[dict[str, Sequence[str]], dict[str, Expected]]:
    """Return which parts of which files, and what is expected of those that are frozen."""
    if quick and not names:
        return {n: parts for n, (parts, _) in QUICK.items()}, {n: reach for n, (_, reach) in QUICK.items()}
    files = dict.fromkeys(names or EXPECTED, select)
    return files, {} if select else {name: EXPECTED[name] for name in files if name in EXPECTED}


def _table(results: Mapping[str, suite.Result], known: set[str]) -> Table:
    """A line per file: tests, calls by way, the two shares, and the seconds that its tests took."""
    columns = ("passed", "known failures", "new", "fused", "added", "base", "peft", "fast", "not PEFT's", "s")
    table = Table("file", *columns)
    for name, result in results.items():
        new = sum(test not in known for test in result.failed)
        tests = (result.passed, len(result.failed) - new, new)
        calls = [f"{result.routes[way]:,}" for way in ("fused", "added", "base", "peft")]
        shares = [f"{share:.1%}" if result.routes else "-" for share in (result.fast_share, result.own_share)]
        table.add_row(name, *map(str, tests), *calls, *shares, f"{result.seconds:.0f}")
    return table


def shortfalls(
    results: Mapping[str, suite.Result], expected: Mapping[str, Expected], known: set[str]
) -> Iterator[str]:
    """Yield what a run did not reach."""
    for name, result in results.items():
        yield from (f"fails only with us: {test}" for test in result.failed if test not in known)
        if not result.passed:
            yield f"{name}: nothing passed"
        if (reach := expected.get(name)) is None:
            continue
        if result.passed < reach.passed:
            yield f"{name}: {result.passed} tests passed, expected at least {reach.passed}"
        for what, share, least in (
            ("calls with an adapter fast", result.fast_share, reach.fast_share),
            ("calls not left to PEFT", result.own_share, reach.own_share),
        ):
            if share < least:
                yield f"{name}: {share:.1%} of {what}, expected {least:.0%}"


if __name__ == "__main__":
    sys.exit(main())
