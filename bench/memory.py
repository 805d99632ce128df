"""Suite `memory`: bytes that the forward pass keeps for backward, PEFT, fastpeft and others, by method.

LoRA and DoRA on one block and on the whole model, with and without dropout; every other method on the whole
model, with PEFT's beside it where PEFT has one (BitFit on the same model with biases).

Parameters and buffers are alive anyway and not counted; for one block its input is not either. `saved` is
what autograd holds through its hooks; `live` is what was allocated in the forward pass and outlived it, which
would also show a tensor hidden from the hooks. Where the two differ, the smaller is not the whole truth: a
tensor from before the forward pass counts in `saved` only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench import contenders, method_rows, options, report, saved, single
from bench.adapter import Adapter
from bench.blocks import BLOCKS, Problem, Shape
from bench.method_rows import WITH_BIASES
from bench.models import DTYPES, WORKLOADS, Workload

Counter = Callable[[], tuple[int, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One table row to be counted."""

    name: str
    """Contender."""
    adapter: Adapter | None
    """None for the frozen base, and for methods without its fields."""
    count: Counter
    """Builds the contender and counts (saved, live) bytes."""
    method: str = ""
    """Of a method without an `Adapter`, its name."""

    @property
    def side(self) -> str:
        """Whose it is."""
        return self.name.partition("-")[0]


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("memory", __doc__)
    add = arguments.add_argument
    add("--shape", type=Shape.parse, default=Shape(M=4096, K=1024, N=2048), metavar="MxKxN",
        help="the blocks: tokens x in x out (default 4096x1024x2048)")  # fmt: skip
    add("--blocks", choices=BLOCKS, nargs="+", default=["linear"], help="of linear (default), qkv, mlp")
    add("--layer-only", action="store_true", help="leave the whole model out")
    add("--model", choices=WORKLOADS, default="llama-768", help="the whole model (default llama-768)")
    add("--methods", choices=method_rows.METHODS, nargs="*", default=list(method_rows.METHODS),
        metavar="NAME", help=f"besides lora and dora, of {', '.join(method_rows.METHODS)} (default: all; "
        "nothing for none)")  # fmt: skip
    add("--rank", type=options.positive, default=16, help="adapter rank (default 16)")
    add("--dropout", type=options.probability, nargs="+", default=[0.0, 0.1], help="default 0.0 and 0.1")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the base (default bfloat16)")
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a contender could not run."""
    arguments = parser().parse_args(argv)
    facts = report.begin("memory", arguments)
    dtype = DTYPES[arguments.dtype]
    adapters = [Adapter(rank=arguments.rank, dora=dora, dropout=dropout)
                for dora in (False, True) for dropout in arguments.dropout]  # fmt: skip
    tail = f"{arguments.dtype}, r={arguments.rank}"
    records: list[report.Record] = []
    failed = False
    for block in arguments.blocks:
        problem = Problem(block=block, shape=arguments.shape, dtype=dtype, device=arguments.device)
        rows = block_rows(problem, adapters)
        failed = fill(f"one {block}, {arguments.shape}, {tail}", rows, records) or failed
    if not arguments.layer_only:
        workload = WORKLOADS[arguments.model]
        title = f"{arguments.model}, {workload.batch}x{workload.sequence} tokens, {tail}"
        rows = model_rows(workload, dtype, adapters, arguments.methods, arguments.rank, arguments.device)
        failed = fill(title, rows, records) or failed
    if arguments.json:
        report.write_json(arguments.json, report.command_line("memory", argv), facts, records)
    return int(failed)


def block_rows(problem: Problem, adapters: Sequence[Adapter]) -> Iterator[Row]:
    """The contenders of one block: ours, and those peers that can run here."""

    def count(build: Callable[[], single.Layer]) -> tuple[int, int]:
        layer = build()
        return saved.count(layer.forward, [*saved.state_of(layer.root), layer.x])

    yield Row(name="frozen", adapter=None, count=partial(count, partial(single.frozen, problem)))
    for adapter in adapters:
        for side, builder in (single.OURS | single.PEERS).items():
            if side == "peft-compiled" or single.missing(side, adapter.method, problem.device):
                continue
            name = f"{side}-{adapter.method}"
            yield Row(name=name, adapter=adapter, count=partial(count, partial(builder, problem, adapter)))


def model_rows(
    workload: Workload,
    dtype: torch.dtype,
    adapters: Sequence[Adapter],
    methods: Sequence[str],
    rank: int,
    device: torch.device,
) -> Iterator[Row]:
    """The contenders of one whole model."""
    base, ids = workload.build(dtype, device=device), workload.batch_ids(device=device)

    def count(build: Callable[[], contenders.Contender]) -> tuple[int, int]:
        contender = build()
        return saved.count(contender.loss, saved.state_of(contender.model))

    for name, baseline in contenders.BASELINES.items():
        yield Row(name=name, adapter=None, count=partial(count, partial(baseline, base, ids)))
    for adapter in adapters:
        for side, builder in contenders.SIDES.items():
            name = f"{side}-{adapter.method}"
            yield Row(name=name, adapter=adapter, count=partial(count, partial(builder, base, ids, adapter)))
    for method in methods:
        own = method_rows.base_for(method, workload, dtype, device) if method in WITH_BIASES else base
        sides = {"peft": method_rows.peft_row} if method in method_rows.PEFT else {}
        for side, build in {**sides, "fastpeft": method_rows.fastpeft_row}.items():
            yield Row(name=f"{side}-{method}", adapter=None, method=method,
                      count=partial(count, partial(build, method, own, ids, rank)))  # fmt: skip


def fill(title: str, rows: Iterator[Row], records: list[report.Record]) -> bool:
    """Count and print one table; whether any contender could not run."""
    lines, failures = [], []
    floor = 0
    peers: dict[Adapter | str, int] = {}
    todo = list(rows)
    with report.progress(title, len(todo)) as advance:
        for row in todo:
            advance(row.name)
            dropout = row.adapter.dropout if row.adapter else 0.0
            record: report.Record = {"case": title, "contender": row.name, "dropout": dropout}
            if row.method and row.side != "peft":
                record["peer"] = f"peft-{row.method}"
            records.append(record)
            try:
                held, live = row.count()
            except Exception as error:  # a contender that cannot run is a row, with its reason
                record["blocked"] = f"{type(error).__name__}: {error}".splitlines()[0]
                failures.append(f"{row.name}: {record['blocked']}")
                continue
            record |= {"saved_bytes": held, "live_bytes": live}
            key = row.adapter or row.method
            if key and row.side == "peft":
                peers[key] = held
            floor = held if row.name == "frozen" else floor
            peer = peers.get(key, 0)
            # A prompt's own rows lie below the first block, where `frozen` has its leaf.
            beyond = f"{(held - floor) / (peer - floor):.1%}" if peer > floor else "-"
            shares = (f"{held / peer:.1%}", beyond) if peer else ("-", "-")
            lines.append([row.name, f"{dropout:g}", report.mebibytes(held), report.mebibytes(live), *shares])
    columns = ("contender", "dropout", "saved MiB", "live MiB", "saved / PEFT's", "beyond frozen / PEFT's")
    note = "beyond frozen: what the adapters add to the frozen base's own saved bytes"
    report.print_table(title, columns, lines, note)
    for failure in failures:
        report.console().print(f"[bold red]not counted[/bold red]: {failure}", soft_wrap=True)
    return bool(failures)
