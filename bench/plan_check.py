"""Suite `plan`: the memory planner against training that really happens, on this machine's CPU.

Each case trains two steps in a process of its own, twice: once plainly, with the process's resident memory
watched by the kernel (VmHWM, from before the weights were made), and once under the planner's own tracker.
`resident` also holds what no tracker sees: an ATen kernel's scratch memory and what the allocator keeps;
glibc is told to map every block of 128 KiB or more by itself, and to give back the rest.

`--papers` compares plans with published tables instead (bench.plan_papers).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import options, report
from bench.models import DTYPES, WORKLOADS, Workload
from fastpeft import LISA, LoRA, MemoryPlan
from fastpeft.ops.eager import seen_through
from fastpeft.planning import methods
from fastpeft.planning.optimizers import Places, Turns, make
from fastpeft.planning.plan import plan
from fastpeft.planning.step import PHASES, Made, train

METHODS: dict[str, Any] = {
    "full": "full",
    "lora": LoRA(r=16),
    "dora": LoRA(r=16, use_dora=True),
    "lisa": LISA(layers=2),
}
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**17),
    "MALLOC_TRIM_THRESHOLD_": str(2**17),
    "MALLOC_MMAP_MAX_": str(10**6),
    "MALLOC_ARENA_MAX": "1",
}
ALLOWED = 0.05


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("plan", __doc__)
    add = arguments.add_argument
    add("--models", nargs="+", choices=WORKLOADS, default=["llama-768", "smollm2-135m"], metavar="MODEL",
        help="default llama-768 and smollm2-135m")  # fmt: skip
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
        help=f"default {' '.join(METHODS)}")  # fmt: skip
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the model (default bfloat16)")
    add("--sequence", type=options.positive, help="tokens a sequence (default: the model's of bench.models)")
    add("--papers", action="store_true", help="compare plans with published tables instead")
    add("--child", help=argparse.SUPPRESS)
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a plan is off by more than 5%."""
    arguments = parser().parse_args(argv)
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return 0
    if arguments.papers:
        from bench import plan_papers

        return plan_papers.main(arguments, argv)
    facts = report.begin("plan", arguments)
    records: list[report.Record] = []
    lines = []
    cases = [(model, method) for model in arguments.models for method in arguments.methods]
    with report.progress("plan", len(cases)) as advance:
        for model, method in cases:
            advance(f"{model} {method}")
            record = compare(model, method, arguments.dtype, arguments.sequence)
            records.append(record)
            lines.append(line_of(record))
    report.print_table(
        f"peak of a training step, {arguments.dtype}",
        ("model, method", "planned MiB", "in", "tracked MiB", "error", "resident MiB", "error"),
        lines,
        "tracked: every storage of the real step; resident: what the kernel counted (VmHWM)",
    )
    if arguments.json:
        report.write_json(arguments.json, report.command_line("plan", argv), facts, records)
    worst = max(
        abs(float(str(record[key]))) for record in records for key in ("tracked_error", "resident_error")
    )
    return int(worst > ALLOWED)


def line_of(record: report.Record) -> tuple[str, ...]:
    """A row of the table."""

    def size(key: str) -> str:
        return report.mebibytes(int(str(record[key])))

    def share(key: str) -> str:
        return f"{float(str(record[key])):+.2%}"

    return (
        f"{record['model']}, {record['method']}", size("planned"), str(record["phase"]), size("tracked"),
        share("tracked_error"), size("resident"), share("resident_error"),
    )  # fmt: skip


def workload_of(model: str, sequence: int | None) -> Workload:
    """A model and its batch."""
    workload = WORKLOADS[model]
    return workload if sequence is None else dataclasses.replace(workload, sequence=sequence)


def compare(model: str, method: str, dtype: str, sequence: int | None) -> report.Record:
    """Plan a step, and run it."""
    workload = workload_of(model, sequence)
    with torch.device("meta"):
        config = workload.build(DTYPES[dtype]).config
    planned: MemoryPlan = plan(
        config, METHODS[method], workload.batch, workload.sequence, DTYPES[dtype], device="cpu"
    )
    names = planned.setting.active_blocks
    active = None if names is None else [int(name.rpartition(".")[2]) for name in names]
    case = {"model": model, "method": method, "dtype": dtype, "sequence": sequence, "active": active}
    found = run_child(case)
    return {
        **case,
        "planned": planned.peak,
        "phase": planned.peak_phase,
        "planned_parts": planned.at_peak,
        "planned_phases": planned.peaks,
        **found,
        "tracked_error": planned.peak / found["tracked"] - 1.0,
        "resident_error": planned.peak / found["resident"] - 1.0,
    }


def run_child(case: dict[str, Any]) -> dict[str, Any]:
    """Train in a process of its own."""
    command = [sys.executable, "-m", "bench.plan_check", "--child", json.dumps(case)]
    done = subprocess.run(
        command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{case}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(case: dict[str, Any]) -> dict[str, Any]:
    """Train for real; the peak by resident memory, and by the tracker."""
    torch.set_num_threads(1)
    workload, dtype = workload_of(case["model"], case["sequence"]), DTYPES[case["dtype"]]
    method = methods.parse(METHODS[case["method"]])
    turns = None
    if method.schedule is not None:
        places = Places(sets=(frozenset(case["active"]),))
        turns = Turns(places, tuple(sorted(method.schedule.always_on)), method.schedule.on_deactivate)
    make_optimizer = partial(make, "adamw", turns=turns, device="cpu")

    def steps(of: Workload, make_optimizer: Callable[[nn.Module], Made]) -> None:
        model = of.build(dtype)
        method.prepare(model)
        reset_peak()
        optimizer, _ = make_optimizer(model)
        for _ in range(2):
            ids = of.batch_ids()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    # Loads what is loaded once, in particular the code of the kernels.
    steps(WORKLOADS["tiny"], partial(make, "adamw", turns=None, device="cpu"))
    gc.collect()
    before = resident("VmRSS")
    steps(workload, make_optimizer)
    highest = resident("VmHWM") - before
    gc.collect()
    model = workload.build(dtype)
    method.prepare(model)
    with seen_through():
        usage = train(model, workload.batch_ids(), make_optimizer, without_values=False)
    phases = {p: max(peak.bytes for r, peak in usage.peaks.items() if r.phase == p) for p in PHASES}
    return {"resident": highest, "tracked": max(phases.values()), "tracked_phases": phases}


def resident(field: str) -> int:
    """Bytes of this process by the kernel: VmRSS now, VmHWM at most since :func:`reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Let the kernel's high-water mark start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
