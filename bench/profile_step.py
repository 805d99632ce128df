"""Suite `profile`: where the time of a training step goes, by kind of operator.

Steps run under torch.profiler, after warm-up. An operator's own time (without the operators it calls) belongs
to one kind: by the optimiser's range it runs in, by its name, and for GEMMs by their shapes, where one with a
dimension equal to the rank is an adapter's and one with the vocabulary's size is the output layer's. What no
operator accounts for is Python and the profiler itself; the same step by the clock, without the profiler,
shows how much that is. Contenders run one after another here: compare kinds within a column, and take ratios
between contenders from the suite `step`.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from bench import contenders, options, report
from bench.contenders import Contender
from bench.models import DTYPES, WORKLOADS

REST = "Python and the rest"
KINDS = ("base GEMMs", "adapter GEMMs", "output layer GEMMs", "attention", "casts and copies", "loss",
         "elementwise, sums", "optimiser", "autograd engine", "own ops' Python", REST)  # fmt: skip
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear",
         "aten::matmul", "aten::mkldnn_linear", "aten::_mkldnn_linear")  # fmt: skip
STEPS = 3
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::cat")
LOSS = ("log_softmax", "nll_loss", "cross_entropy")


@dataclass(kw_only=True, slots=True)
class Profile:
    """Milliseconds of one step by kind."""

    clock: float
    """Median step without the profiler."""
    total: float
    """Mean profiled step, by the clock."""
    kinds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By kind; sums to `total`."""
    operators: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    """By (kind, operator)."""
    calls: int = 0
    """Operators called."""


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("profile", __doc__)
    add = arguments.add_argument
    add("--model", choices=WORKLOADS, default="llama-768", help="model and batch (default llama-768)")
    add("--rank", type=options.positive, default=16, help="adapter rank (default 16); GEMMs are told "
        "apart by it, so it must be no other dimension of the model")  # fmt: skip
    add("--contenders", nargs="+", choices=contenders.NAMES, metavar="NAME",
        default=["frozen", "fastpeft-lora", "fastpeft-dora"],
        help=f"of {', '.join(contenders.NAMES)} (default frozen and both of fastpeft)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the base (default bfloat16)")
    add("--top", type=options.positive, default=8, help="operators listed for the last contender (default 8)")
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite."""
    commands = parser()
    arguments = commands.parse_args(argv)
    workload = WORKLOADS[arguments.model]
    if arguments.device.type != "cpu":
        commands.error("argument --device: operators are told apart by the processor's time; expected cpu")
    if arguments.rank in (workload.hidden, workload.intermediate, workload.vocab, workload.tokens):
        commands.error(
            f"--rank {arguments.rank} is a dimension of {arguments.model}: adapter GEMMs would not show"
        )
    facts = report.begin("profile", arguments)
    base = workload.build(DTYPES[arguments.dtype], device=arguments.device)
    ids = workload.batch_ids(device=arguments.device)
    profiles: dict[str, Profile] = {}
    with report.progress("profile", len(arguments.contenders)) as advance:
        for name in arguments.contenders:
            advance(name)
            contender = contenders.build(name, base, ids, arguments.rank)
            profiles[name] = measure(contender, arguments.rank, workload.vocab)
    size = f"{workload.batch}x{workload.sequence} tokens"
    title = f"{arguments.model}, {size}, {arguments.dtype}, r={arguments.rank}"
    show(title, profiles, arguments.top)
    if arguments.json:
        records: list[report.Record] = [
            {"model": arguments.model, "dtype": arguments.dtype, "rank": arguments.rank, "contender": name,
             "clock_ms": p.clock, "profiled_ms": p.total, "operators_called": p.calls, "ms": dict(p.kinds)}
            for name, p in profiles.items()
        ]  # fmt: skip
        report.write_json(arguments.json, report.command_line("profile", argv), facts, records)
    return 0


def measure(contender: Contender, rank: int, vocab: int) -> Profile:
    """Profile `STEPS` steps of `contender`."""
    contender.step()
    clock = 1e3 * median(contender.step()["step"] for _ in range(STEPS))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = perf_counter()
        for _ in range(STEPS):
            contender.step()
        total = 1e3 * (perf_counter() - start) / STEPS
    result = Profile(clock=clock, total=total)
    calls = 0
    events = profiler.events()
    for event in events or ():
        milliseconds = 1e-3 * event.self_cpu_time_total / STEPS
        label = kind(event, rank, vocab)
        result.kinds[label] += milliseconds
        result.operators[(label, str(event.name))] += milliseconds
        calls += str(event.name).startswith("aten::")
    result.calls = calls // STEPS
    result.kinds[REST] += total - sum(result.kinds.values())
    return result


def kind(event: FunctionEvent, rank: int, vocab: int) -> str:
    """The kind that an operator's own time belongs to."""
    name = str(event.name)
    ancestor: FunctionEvent | None = event
    while ancestor is not None:
        if str(ancestor.name).startswith("Optimizer."):
            return "optimiser"
        ancestor = ancestor.cpu_parent
    if any(part in name for part in LOSS):
        return "loss"
    if "scaled_dot_product" in name:
        return "attention"
    if name in GEMMS:
        shapes: Any = event.input_shapes  # a list for every tensor, declared otherwise
        sizes = {size for shape in shapes if isinstance(shape, list) for size in shape}
        if rank in sizes:
            return "adapter GEMMs"
        return "output layer GEMMs" if vocab in sizes else "base GEMMs"
    if name in COPIES:
        return "casts and copies"
    if name.startswith("aten::"):
        return "elementwise, sums"
    if name.startswith("autograd::") or name.endswith(("Backward0", "Backward1", "AccumulateGrad")):
        return "autograd engine"
    if "fastpeft" in name.lower() or name.endswith("Backward"):
        return "own ops' Python"
    return REST


def show(title: str, profiles: dict[str, Profile], top: int) -> None:
    """Print milliseconds by kind, each beside its share, then the largest operators of the last contender."""
    rows = []
    for label in KINDS:
        values = [p.kinds[label] for p in profiles.values()]
        shares = [f"{p.kinds[label]:.1f} ({p.kinds[label] / p.total:.0%})" for p in profiles.values()]
        if any(values):
            rows.append([label, *shares])
    rows.append(["profiled step", *(f"{p.total:.1f}" for p in profiles.values())])
    rows.append(["same step, clock", *(f"{p.clock:.1f}" for p in profiles.values())])
    rows.append(["operators called", *(str(p.calls) for p in profiles.values())])
    report.print_table(f"{title}: ms of own time", ("kind", *profiles), rows)
    name, last = list(profiles.items())[-1]
    ordered = sorted(last.operators.items(), key=lambda item: item[1], reverse=True)
    largest = [[operator, label, f"{ms:.1f}"] for (label, operator), ms in ordered[:top]]
    report.print_table(f"largest operators of {name}", ("operator", "kind", "ms"), largest)
