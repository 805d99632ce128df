"""Bytes that LoRA and DoRA move, counted launch by launch, beside the floor and the peers.

    python -m bench traffic [--target sm_90] [--ranks 16 64] [--shape 8192x4096x4096] [--dropout 0.1] [--bias]

One linear layer (`layer_traffic`), then the fused blocks (`block_traffic`): q/k/v of one width, q/k/v of
grouped queries, the gated MLP.

For every launch two counts. "issued" is what its tiles ask of the memory system: loads and stores of one
program of the recorded grid, times the programs; tiles that several programs share are served by L2. The
"compulsory" bytes are each tensor of the launch once in and once out, which is what L2 leaves to memory at
best. Pass by pass, the compulsory bytes stand beside the target and the peers' formulas (`peers.py`).

Fails where a pass has more launches than its target, or where its compulsory bytes of full-size tensors (x,
W, y, a gate's g, u and h, and their gradients) are above the target's formula. Terms of the rank, packed
masks and the fp32 partials of split reductions (written and read in one launch) are printed apart; formulas
are compared with the full-size tensors alone, which is all they have. A target is wider where it cannot be
met, and says why (`peers.limit`): ranks above the tiles that share a read of dY, z beside a bias. PEFT's
dropout on DoRA keeps z besides y and reads a packed mask; a layer prints it, and the limits, which are for
no dropout or for dropout in front of A only, are not applied to it. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import torch

from bench import report
from bench.block_traffic import blocks
from bench.layer_traffic import Layer
from bench.peers import Formula
from bench.single import Shape

if TYPE_CHECKING:
    from bench.launch_traffic import Operand, Pass

MIB = 2**20
UNITS = 132  # multiprocessors the launchers are told of; decides how reductions are split

LAUNCH_COLUMNS = ("pass", "kernel", "programs", "loaded MiB", "stored MiB", "compulsory MiB", "GFLOP")
PASS_COLUMNS = ("pass", "implementation", "launches", "full-size", "rank", "partials", "total", "of ours")


class Subject(Protocol):
    """What is counted: a `Layer` or a `Block`, whose docstrings say what each of these is."""

    def title(self) -> str: ...

    def about(self) -> report.Record: ...

    def passes(self) -> Iterator[Pass]: ...

    def is_wide(self, operand: Operand) -> bool: ...

    def moved(self, formula: Formula) -> float: ...

    def target(self, method: str, name: str) -> Formula: ...

    def has_limit(self, method: str) -> bool: ...

    def peers(self, method: str, name: str) -> Iterator[Formula]: ...

    def published(self, method: str, name: str) -> Iterator[tuple[str, float, int]]: ...


def measure(subject: Subject, target: str) -> Iterator[report.Record]:
    """One record a pass, with its launches."""
    from bench.launch_traffic import counted

    for method, name, run in subject.passes():
        with counted(target, UNITS) as launches:
            run()
        operands = [operand for item in launches for operand in item.operands]
        wide = sum(operand.compulsory for operand in operands if subject.is_wide(operand))
        yield {
            "target": target,
            **subject.about(),
            "method": method,
            "pass": name,
            "launches": [
                {
                    "kernel": item.kernel,
                    "programs": item.programs,
                    "loaded": round(item.loaded),
                    "stored": round(item.stored),
                    "compulsory": item.compulsory,
                    "flops": round(item.flops),
                }
                for item in launches
            ],
            "issued": round(sum(item.loaded + item.stored for item in launches)),
            "compulsory": sum(item.compulsory for item in launches),
            "compulsory_wide": wide,
            "compulsory_partials": sum(o.compulsory for o in operands if o.loaded and o.stored),
        }


def problems(subject: Subject, row: report.Record) -> Iterator[str]:
    """Which of the target's limits a pass breaks."""
    method, name, launches, wide = row["method"], row["pass"], row["launches"], row["compulsory_wide"]
    assert isinstance(method, str)
    assert isinstance(name, str)
    assert isinstance(launches, list)
    assert isinstance(wide, int)
    if not subject.has_limit(method):
        return
    limit = subject.target(method, name)
    where = f"{method} {name}, {subject.title()}"
    if limit.launches is not None and len(launches) > limit.launches:
        yield f"{where}: {len(launches)} launches, at most {limit.launches}"
    allowed = subject.moved(limit)
    if wide > allowed:
        yield f"{where}: {wide / MIB:.1f} MiB at full size, at most {limit.text()} = {allowed / MIB:.1f}"


def mib(count: float) -> str:
    return f"{count / MIB:,.1f}"


def launch_rows(rows: Sequence[report.Record]) -> Iterator[list[str]]:
    """The table of launches."""
    for row in rows:
        launches = row["launches"]
        assert isinstance(launches, list)
        for item in launches:
            yield [
                f"{row['method']} {row['pass']}",
                item["kernel"],
                str(item["programs"]),
                mib(item["loaded"]),
                mib(item["stored"]),
                mib(item["compulsory"]),
                f"{item['flops'] / 1e9:,.1f}",
            ]


def pass_rows(subject: Subject, rows: Sequence[report.Record]) -> Iterator[list[str]]:
    """The table of passes: ours as counted, the target, the peers, each against ours."""
    for row in rows:
        method, name, launches = row["method"], row["pass"], row["launches"]
        total, wide, partials = row["compulsory"], row["compulsory_wide"], row["compulsory_partials"]
        assert isinstance(method, str)
        assert isinstance(name, str)
        assert isinstance(launches, list)
        assert isinstance(total, int)
        assert isinstance(wide, int)
        assert isinstance(partials, int)
        title = f"{method} {name}"
        rest = mib(total - wide - partials)
        parts = mib(wide), rest, mib(partials), mib(total)
        yield [title, "fastpeft, counted", str(len(launches)), *parts, "1.00"]
        for formula in (subject.target(method, name), *subject.peers(method, name)):
            moved = subject.moved(formula)
            label = f"{formula.name}: {formula.text()}"
            count = str(formula.launches or "-")
            yield [title, label, count, mib(moved), "-", "-", "-", f"{moved / wide:.2f}"]
        for peer, published, peer_launches in subject.published(method, name):
            ratio = published * MIB / total
            yield [title, peer, str(peer_launches), "-", "-", "-", mib(published * MIB), f"{ratio:.2f}"]


def parser() -> argparse.ArgumentParser:
    """The options of this suite."""
    result = report.Parser(
        "traffic", "Bytes and FLOPs of each kernel, counted from its launch, beside floor and peers."
    )
    result.add_argument("--target", default="sm_90", help="whose tiles to count with (default sm_90)")
    result.add_argument(
        "--shape",
        type=Shape.parse,
        default=Shape(M=8192, K=4096, N=4096),
        help="MxKxN, tokens x in x out (default 8192x4096x4096)",
    )
    result.add_argument(
        "--ranks", type=report.positive, nargs="+", default=[16, 64], help="ranks (default 16 64)"
    )
    result.add_argument(
        "--kv", type=report.positive, help="width of k and v in grouped q/k/v (default a quarter of N)"
    )
    result.add_argument(
        "--d-ff", type=report.positive, help="inner width of the gated MLP (default 3.5 times K)"
    )
    result.add_argument("--dropout", type=float, default=0.0, help="dropout in front of A (default 0)")
    result.add_argument("--bias", action="store_true", help="the layer with a bias besides: DoRA keeps z")
    result.add_argument("--json", type=report.new_file, metavar="PATH", help="also write the results to PATH")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, and say what is above its limit; 1 if anything is."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        # Kernels are made for the interpreter, or not, when they are imported.
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", "bench", "traffic", *words]
        return subprocess.run(command, env=environment, check=False).returncode
    rows: list[report.Record] = []
    wrong: list[str] = []
    shape, dropout = arguments.shape, arguments.dropout
    sizes = {
        "tokens": shape.M,
        "features": shape.K,
        "out": shape.N,
        "kv": arguments.kv or max(1, shape.N // 4),
        "d_ff": arguments.d_ff or 7 * shape.K // 2,
    }
    subjects: list[Subject] = []
    for rank in arguments.ranks:
        layer = Layer(shape=shape, rank=rank, dropout=dropout, table=arguments.target)
        subjects.append(layer)
        if arguments.bias:
            subjects.append(replace(layer, bias=True))
        subjects += blocks(**sizes, rank=rank, dropout=dropout, table=arguments.target)
    for subject in subjects:
        found = list(measure(subject, arguments.target))
        wrong += [problem for row in found for problem in problems(subject, row)]
        rows += found
        title = f"{subject.title()}, tiles of {arguments.target}"
        report.print_table(f"{title}: launches", LAUNCH_COLUMNS, launch_rows(found))
        report.print_table(f"{title}: passes, MiB", PASS_COLUMNS, pass_rows(subject, found))
    for problem in wrong:
        print(f"ABOVE ITS LIMIT {problem}")
    if arguments.json:
        versions = {"torch": torch.__version__, "triton": version("triton")}
        report.write_json(arguments.json, report.command_line("traffic", words), versions, rows)
    return 1 if wrong else 0
