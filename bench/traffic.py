"""Bytes that LoRA's and DoRA's linear layer move, counted launch by launch, beside the floor and the peers.

    python -m bench traffic [--target sm_90] [--ranks 16 64] [--shape 8192x4096x4096] [--dropout 0.1]

For every launch two counts. "issued" is what its tiles ask of the memory system: loads and stores of one
program of the recorded grid, times the programs; tiles that several programs share are served by L2. The
"compulsory" bytes are each tensor of the launch once in and once out, which is what L2 leaves to memory at
best. Pass by pass, the compulsory bytes stand beside the target and the peers' formulas (`peers.py`).

Fails where a pass has more launches than its target, or where its compulsory bytes of full-size tensors
(x, W, y and their gradients) are above the target's formula. Terms of the rank and the fp32 partials of split
reductions (written and read in one launch) are printed apart; formulas are compared with the full-size
tensors alone, which is all they have. PEFT's dropout on DoRA keeps z besides y and reads a packed mask; it is
printed, and the limits, which are for no dropout or for dropout in front of A only, are not applied to it.
Nothing here is a time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from bench import report
from bench.peers import PEERS, PUBLISHED, PUBLISHED_AT, TARGETS
from bench.single import Shape

MIB = 2**20
UNITS = 132  # multiprocessors the launchers are told of; decides how reductions are split

LAUNCH_COLUMNS = ("pass", "kernel", "programs", "loaded MiB", "stored MiB", "compulsory MiB", "GFLOP")
PASS_COLUMNS = ("pass", "implementation", "launches", "full-size", "rank", "partials", "total", "of ours")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One linear layer: its sizes (M tokens, K in, N out), the rank and the dropout in front of A."""

    shape: Shape
    rank: int
    dropout: float

    def is_wide(self, dims: Sequence[int]) -> bool:
        """Whether a tensor of these dimensions is as large as x, W or y."""
        m, n, k = self.shape.M, self.shape.N, self.shape.K
        return sorted(dims) in (sorted((m, k)), sorted((n, k)), sorted((m, n)))


Pass = tuple[str, str, Callable[[], object]]
"""Method, name of the pass, and what runs it."""


def passes(layer: Layer) -> Iterator[Pass]:
    """What one training step calls; tensors are allocated and never touched."""
    from fastpeft_kernels import dora, lora

    m, n, k = layer.shape.M, layer.shape.N, layer.shape.K
    dropout_p, r = layer.dropout, layer.rank

    def wide(*dims: int) -> torch.Tensor:
        return torch.empty(dims, dtype=torch.bfloat16)

    def narrow(*dims: int) -> torch.Tensor:
        return torch.empty(dims, dtype=torch.float32)

    x, y, dy, weight, S = wide(m, k), wide(m, n), wide(m, n), wide(n, k), wide(m, r)
    lora_A, lora_B, magnitude, norm = narrow(r, k), narrow(n, r), narrow(n), narrow(n)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p > 0.0 else None
    yield (
        "lora",
        "forward",
        lambda: lora.lora_forward(x, weight, None, lora_A, lora_B, 2.0, dropout_p, seed),
    )
    yield (
        "lora",
        "backward",
        lambda: lora.lora_backward(
            dy,
            x,
            weight,
            lora_A,
            lora_B,
            S,
            2.0,
            dropout_p,
            seed,
            need_x=True,
            need_A=True,
            need_B=True,
            need_bias=False,
        ),
    )
    drop_base = dropout_p > 0.0  # PEFT's default; without dropout it makes no difference

    def forward() -> None:
        dora.dora_forward(
            x,
            weight,
            None,
            lora_A,
            lora_B,
            magnitude,
            norm,
            2.0,
            dropout_p,
            seed,
            drop_base=drop_base,
            keep_z=drop_base,
        )

    def with_norm() -> None:
        dora.row_norm(weight, lora_A, lora_B, 2.0)
        forward()

    def backward() -> None:
        dora.dora_backward(
            dy,
            x,
            y,
            weight,
            lora_A,
            lora_B,
            magnitude,
            norm,
            S,
            2.0,
            dropout_p,
            seed,
            drop_base=drop_base,
            kept_is_z=drop_base,
            need_x=True,
            need_A=True,
            need_B=True,
            need_m=True,
            need_bias=False,
        )

    yield "dora", "forward", with_norm
    yield "dora", "forward, norm cached", forward
    yield "dora", "backward", backward


def measure(layer: Layer, target: str) -> Iterator[report.Record]:
    """One record a pass, with its launches."""
    from bench.launch_traffic import counted

    for method, name, run in passes(layer):
        with counted(target, UNITS) as launches:
            run()
        operands = [operand for item in launches for operand in item.operands]
        wide = sum(operand.compulsory for operand in operands if layer.is_wide(operand.shape))
        yield {
            "target": target,
            "shape": str(layer.shape),
            "rank": layer.rank,
            "dropout": layer.dropout,
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


def problems(layer: Layer, row: report.Record) -> Iterator[str]:
    """Which of the target's limits a pass breaks."""
    method, name, launches, wide = row["method"], row["pass"], row["launches"], row["compulsory_wide"]
    assert isinstance(method, str)
    assert isinstance(name, str)
    assert isinstance(launches, list)
    assert isinstance(wide, int)
    if method == "dora" and layer.dropout > 0.0:
        return
    limit = TARGETS[method, name]
    where = f"{method} {name} at {layer.shape}, r={layer.rank}, dropout {layer.dropout:g}"
    if limit.launches is not None and len(launches) > limit.launches:
        yield f"{where}: {len(launches)} launches, at most {limit.launches}"
    allowed = limit.bytes(layer.shape.M, layer.shape.N, layer.shape.K)
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


def pass_rows(layer: Layer, rows: Sequence[report.Record]) -> Iterator[list[str]]:
    """The table of passes: ours as counted, the target, the peers, each against ours."""
    m, n, k = layer.shape.M, layer.shape.N, layer.shape.K
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
        for formula in (TARGETS[method, name], *PEERS[method, name]):
            moved = formula.bytes(m, n, k)
            label = f"{formula.name}: {formula.text()}"
            count = str(formula.launches or "-")
            yield [title, label, count, mib(moved), "-", "-", "-", f"{moved / wide:.2f}"]
        if (m, n, k, layer.rank) == PUBLISHED_AT:
            for peer, published, peer_launches in PUBLISHED.get((method, name), ()):
                ratio = published * MIB / total
                yield [title, peer, str(peer_launches), "-", "-", "-", mib(published * MIB), f"{ratio:.2f}"]


def parser() -> argparse.ArgumentParser:
    """The options of this suite."""
    result = argparse.ArgumentParser(
        prog="python -m bench traffic",
        description="Bytes and FLOPs of each kernel, counted from its launch, beside floor and peers.",
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
    result.add_argument("--dropout", type=float, default=0.0, help="dropout in front of A (default 0)")
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
    for rank in arguments.ranks:
        layer = Layer(shape=arguments.shape, rank=rank, dropout=arguments.dropout)
        found = list(measure(layer, arguments.target))
        wrong += [problem for row in found for problem in problems(layer, row)]
        rows += found
        title = f"{layer.shape} (tokens x in x out), bf16, r={rank}, dropout {layer.dropout:g}"
        title += f", tiles of {arguments.target}"
        report.print_table(f"{title}: launches", LAUNCH_COLUMNS, launch_rows(found))
        report.print_table(f"{title}: passes, MiB", PASS_COLUMNS, pass_rows(layer, found))
    for problem in wrong:
        print(f"ABOVE ITS LIMIT {problem}")
    if arguments.json:
        versions = {"torch": torch.__version__, "triton": version("triton")}
        report.write_json(arguments.json, report.command_line("traffic", words), versions, rows)
    return 1 if wrong else 0
