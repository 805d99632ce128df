"""Suite `profile`: where the time of a training step goes, by kind of operator.

One step under torch.profiler, after warm-up. An operator's own time (without the operators it calls) is
attributed to one kind: by the optimiser's range it runs in, by its name, and for GEMMs by its shapes: one with
a dimension equal to the rank is an adapter's, one with the vocabulary's size is the output layer's. What no
operator accounts for is Python, autograd's bookkeeping and the profiler itself; `clock` is the same step
without the profiler, so that the profiler's share can be seen.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from bench import contenders, report
from bench.contenders import Contender
from bench.models import DTYPES, WORKLOADS

KINDS = ("base GEMMs", "adapter GEMMs", "output layer GEMMs", "attention", "casts and copies", "loss",
         "elementwise, sums", "optimiser", "autograd engine", "own ops' Python", "Python and the rest")  # fmt: skip
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul",
         "aten::mkldnn_linear", "aten::_mkldnn_linear")  # fmt: skip
COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::cat")
LOSS = ("log_softmax", "nll_loss", "cross_entropy")


@dataclass(kw_only=True, slots=True)
class Profile:
    """Milliseconds of one step by kind."""

    clock: float
    """Median of three steps without the profiler."""
    total: float
    """The profiled step, by the clock."""
    kinds: Counter[str] = field(default_factory=Counter)
    """By kind; sums to `total`."""
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (kind, operator)."""
    calls: int = 0
    """Operators called."""


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = argparse.ArgumentParser(
        prog="python -m bench profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("--model", choices=WORKLOADS, default="llama-768", help="model and batch (default llama-768)")
    add("--rank", type=report.positive, default=16, help="adapter rank (default 16). GEMMs are told apart by "
        "it: choose one that is no other dimension of the model")  # fmt: skip
    add("--contenders", nargs="+", choices=contenders.NAMES, default=["frozen", "fastpeft-lora", "fastpeft-dora"],
        metavar="NAME", help=f"of {', '.join(contenders.NAMES)} (default frozen and both of fastpeft)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the base (default bfloat16)")
    add("--top", type=report.positive, default=8, help="operators listed for the last contender (default 8)")
    report.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite."""
    arguments = parser().parse_args(argv)
    facts = report.begin("profile", arguments)
    workload = WORKLOADS[arguments.model]
    base, ids = workload.build(DTYPES[arguments.dtype]), workload.batch_ids()
    profiles: dict[str, Profile] = {}
    with report.progress("profile", len(arguments.contenders)) as advance:
        for name in arguments.contenders:
            advance(name)
            contender = contenders.build(name, base, ids, arguments.rank)
            profiles[name] = measure(contender, arguments.rank, workload.vocab)
    title = f"{arguments.model}, {workload.batch}x{workload.sequence} tokens, {arguments.dtype}, r={arguments.rank}"
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
    """Profile one step of `contender`."""
    contender.step()
    clock = 1e3 * median(contender.step()["step"] for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = perf_counter()
        contender.step()
        total = 1e3 * (perf_counter() - start)
    result = Profile(clock=clock, total=total)
    events = profiler.events()
    for event in events or ():
        milliseconds = 1e-3 * event.self_cpu_time_total
        label = kind(event, rank, vocab)
        result.kinds[label] += milliseconds
        result.operators[(label, str(event.name))] += milliseconds
        result.calls += str(event.name).startswith("aten::")
    result.kinds[KINDS[-1]] += total - sum(result.kinds.values())
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
        sizes = {size for shape in event.input_shapes if isinstance(shape, list) for size in shape}
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
    return KINDS[-1]


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
    largest = [[operator, label, f"{ms:.1f}"] for (label, operator), ms in last.operators.most_common(top)]
    report.print_table(f"largest operators of {name}", ("operator", "kind", "ms"), largest)
