"""Suite `step`: whole training steps, fastpeft and PEFT side by side.

A step is forward with labels, backward, AdamW step, zero_grad. `frozen` is the floor: the frozen base's
forward and full input-gradient backward without adapters or optimiser; `full` is full fine-tuning.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bench import contenders, parity, report, saved
from bench.contenders import Contender
from bench.measure import Samples, Spread, interleave, pairwise_ratio
from bench.models import DTYPES, WORKLOADS, Workload

PHASES = ("step", "forward", "backward", "optimizer")


@dataclass(kw_only=True)
class Lineup:
    """The contenders that may be timed, and why the others may not."""

    ready: dict[str, Contender] = field(default_factory=dict)
    """Contenders by the label of their table row."""
    blocked: dict[str, str] = field(default_factory=dict)
    """Reasons by contender."""
    checks: dict[str, list[parity.Check]] = field(default_factory=dict)
    """What the parity gate compared, by contender."""


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = argparse.ArgumentParser(prog="python -m bench step", description=__doc__)
    add = arguments.add_argument
    add("--model", choices=WORKLOADS, default="llama-768", help="model and batch (default llama-768)")
    add("--ranks", type=report.positive, nargs="+", default=[16, 64], help="adapter ranks (default 16 64)")
    add("--contenders", nargs="+", choices=contenders.NAMES, default=list(contenders.NAMES), metavar="NAME",
        help=f"which to run, in this order; a name given twice shows the noise. "
        f"Of: {', '.join(contenders.NAMES)} (default all)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the base (default bfloat16)")
    add("--batch", type=report.positive, help="sequences a step, instead of the model's own")
    add("--sequence", type=report.positive, help="tokens a sequence, instead of the model's own")
    report.add_timing(arguments, rounds=10)
    report.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a contender was blocked."""
    arguments = parser().parse_args(argv)
    facts = report.begin("step", arguments)
    workload = sized(WORKLOADS[arguments.model], arguments.batch, arguments.sequence)
    dtype = DTYPES[arguments.dtype]
    base, ids = workload.build(dtype), workload.batch_ids()
    records: list[report.Record] = []
    blocked = False
    for rank in arguments.ranks:
        title = f"{arguments.model}, {workload.batch}x{workload.sequence} tokens, {arguments.dtype}, r={rank}"
        lineup = line_up(arguments.contenders, base, ids, rank, dtype)
        kept = {name: saved_bytes(contender) for name, contender in lineup.ready.items()}
        total = len(lineup.ready) * (arguments.warmup + arguments.rounds)
        with report.progress(f"step r={rank}", total) as advance:
            runs = {name: contender.step for name, contender in lineup.ready.items()}
            samples = interleave(runs, rounds=arguments.rounds, warmup=arguments.warmup, on_run=advance)
        show(title, workload, samples, kept, lineup)
        for name in (*lineup.ready, *lineup.blocked):
            records.append(
                {"model": arguments.model, "batch": workload.batch, "sequence": workload.sequence,
                 "dtype": arguments.dtype, "rank": rank, "contender": name,
                 "seconds": samples.get(name, {}), "saved_bytes": kept.get(name),
                 "blocked": lineup.blocked.get(name),
                 "parity": [{"quantity": c.quantity, "error": c.error, "peft": c.peer_error}
                            for c in lineup.checks.get(name, [])]}
            )  # fmt: skip
        blocked = blocked or bool(lineup.blocked)
    if arguments.json:
        report.write_json(arguments.json, report.command_line("step", argv), facts, records)
    return int(blocked)


def sized(workload: Workload, batch: int | None, sequence: int | None) -> Workload:
    """`workload` with another batch."""
    return replace(workload, batch=batch or workload.batch, sequence=sequence or workload.sequence)


def line_up(names: Sequence[str], base: nn.Module, ids: Tensor, rank: int, dtype: torch.dtype) -> Lineup:
    """Build the contenders and let those with adapters through the parity gate.

    PEFT's contender of the same method is the yardstick, and is built even when it is not asked for.
    """
    lineup = Lineup()
    yardsticks: dict[str, tuple[Contender, parity.Outcome, parity.Outcome]] = {}
    with report.progress(f"build and check r={rank}", len(names)) as advance:
        for name in names:
            advance(name)
            label = name
            while label in lineup.ready or label in lineup.blocked:
                label += " again"
            try:
                contender = contenders.build(name, base, ids, rank)
                side, _, method = name.partition("-")
                if method and side != "peft":
                    if method not in yardsticks:
                        peer = contenders.build(f"peft-{method}", base, ids, rank)
                        wide = parity.truth(peer, parity.wider(dtype))
                        yardsticks[method] = (peer, wide, parity.outcome(peer))
                    peer, wide, peers = yardsticks[method]
                    contenders.copy_adapters(peer, contender)
                    lineup.checks[label] = parity.compare(wide, peers, parity.outcome(contender), dtype)
                    reason = parity.failure(lineup.checks[label])
                    if reason:
                        lineup.blocked[label] = f"parity: {reason}"
                        continue
                lineup.ready[label] = contender
            except Exception as error:  # a contender that cannot run is a row of the table, with its reason
                lineup.blocked[label] = f"cannot run: {type(error).__name__}: {error}".splitlines()[0]
    return lineup


def saved_bytes(contender: Contender) -> int:
    """Bytes one forward pass keeps for backward, parameters and buffers apart."""
    with saved.SavedBytes(saved.state_of(contender.model)) as counter:
        loss = contender.loss()
    count = counter.bytes()
    del loss
    return count


def show(title: str, workload: Workload, samples: Samples, kept: dict[str, int], lineup: Lineup) -> None:
    """Print the table, then what the gate found."""
    rows = []
    for name in samples:
        step = samples[name]["step"]
        method = name.split()[0].partition("-")[2]
        peer = f"peft-{method}"
        rows.append([
            name,
            f"{workload.tokens / Spread.of(step).median:.0f}",
            report.milliseconds(Spread.of(step)),
            *(f"{1e3 * Spread.of(samples[name][phase]).median:.0f}" for phase in PHASES[1:]),
            report.ratio(over(samples, peer, name) if method else None),
            report.ratio(over(samples, name, "frozen")),
            report.ratio(over(samples, name, "full")),
            report.mebibytes(kept[name]),
            f"{kept[name] / kept[peer]:.0%}" if method and peer in kept else "-",
        ])  # fmt: skip
    columns = ("contender", "tokens/s", "step ms", "fwd ms", "bwd ms", "opt ms", "speed / PEFT's",
               "time / frozen", "time / full", "saved MiB", "of PEFT's")  # fmt: skip
    note = (
        "medians ± half the interquartile range; ratios taken round by round; saved: bytes kept for backward"
    )
    report.print_table(title, columns, rows, note)
    out = report.console()
    for name, reason in lineup.blocked.items():
        out.print(f"[bold red]{name} is not timed[/bold red]: {reason}", soft_wrap=True)
    for name, checks in lineup.checks.items():
        text = ", ".join(f"{check.quantity} {check.error:.1e} ({check.peer_error:.1e})" for check in checks)
        out.print(f"parity of {name}, error (PEFT's error) against a wider dtype: {text}", soft_wrap=True)


def over(samples: Samples, name: str, other: str) -> Spread | None:
    """Time of `name` over that of `other`, if both ran."""
    if name not in samples or other not in samples:
        return None
    return pairwise_ratio(samples[name]["step"], samples[other]["step"])
