"""Suite `optimizer`: LayerSparseAdamW's step beside torch's AdamW on the same active parameters.

Parameters and gradients are those of a model with a few active blocks; only `optimizer.step()` is timed.
`switch` contenders change blocks at every step, and leave the moments of those that stop as their name says:
their time beside ours without a switch is what one switch costs. A contender is timed only after three steps
gave torch's numbers, bit for bit; GaLore's only after they gave its formula's. Its steps are timed without
new projections, and with new ones in each. (LOMO has no step; its updates are timed in the suite `step`.)
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import optimizer_peers, options, report
from bench.clock import Stopwatch
from bench.measure import Phases, Samples, Spread, interleave, pairwise_ratio
from bench.models import DTYPES, WORKLOADS
from fastpeft import LISA, LayerSparseAdamW
from fastpeft.planning import peers
from fastpeft.sparse.schedule import POLICIES, Policy

LR = 1e-5
NEVER = 10**9  # steps from switch to switch
WAYS: dict[str, dict[str, Any]] = {"foreach": {"foreach": True}, "fused": {"fused": True}}


class Runner:
    """An optimiser over parameters whose gradients are made up beforehand."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def give_gradients(self) -> None:
        """Random gradients, the same for the same parameter, to those that train."""
        for index, parameter in enumerate(self.model.parameters()):
            if parameter.requires_grad and parameter.grad is None:
                generator = torch.Generator().manual_seed(index)
                values = torch.randn(parameter.shape, generator=generator)
                parameter.grad = values.to(parameter)

    def step(self) -> Phases:
        """One timed step of the optimiser."""
        self.give_gradients()
        watch = Stopwatch(next(self.model.parameters()).device)
        self.optimizer.step()
        watch.mark("optimizer")
        return {"step": watch.phases("step")["step"]}


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("optimizer", __doc__)
    add = arguments.add_argument
    add("--model", choices=WORKLOADS, default="llama-768", help="whose parameters (default llama-768)")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the parameters (default float32)")
    add("--layers", type=options.positive, default=2, help="active blocks (default 2)")
    add("--always-on", action="store_true", help="embeddings, norms and head train too, as LISA has it")
    options.add_timing(arguments, rounds=15)
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a step's numbers are not torch's."""
    commands = parser()
    arguments = commands.parse_args(argv)
    workload = WORKLOADS[arguments.model]
    if arguments.layers > workload.layers:
        commands.error(f"argument --layers: {arguments.model} has {workload.layers} blocks")
    facts = report.begin("optimizer", arguments)
    base = workload.build(DTYPES[arguments.dtype], device=arguments.device)
    ready, blocked = line_up(base, arguments.layers, arguments.always_on)
    failed = bool(blocked)
    if reason := optimizer_peers.missing("galore"):
        blocked["galore"] = reason  # listed; no failure of this machine's
    elif reason := optimizer_peers.galore_difference():
        blocked["galore"], failed = reason, True
    else:
        ready |= galores(ready["torch, foreach"].model)
    runs: dict[str, Callable[[], Phases]] = {name: runner.step for name, runner in ready.items()}
    with report.progress("optimizer", len(runs) * (arguments.warmup + arguments.rounds)) as advance:
        samples = interleave(runs, rounds=arguments.rounds, warmup=arguments.warmup, on_run=advance)
    active = sum(p.numel() for p in ready["torch, foreach"].model.parameters() if p.requires_grad)
    title = f"{arguments.model}, {arguments.dtype}, {arguments.layers} of {workload.layers} blocks, "
    show(f"{title}{active / 1e6:.1f}M active parameters", samples, blocked)
    if arguments.json:
        case = {"model": arguments.model, "dtype": arguments.dtype, "layers": arguments.layers,
                "blocks": workload.layers}  # fmt: skip
        records: list[report.Record] = [
            {**case, "contender": name, "peer": peer_of(name), "seconds": seconds}
            for name, seconds in samples.items()
        ]
        records += [{**case, "contender": name, "blocked": reason} for name, reason in blocked.items()]
        report.write_json(arguments.json, report.command_line("optimizer", argv), facts, records)
    return int(failed)


def peer_of(name: str) -> str:
    """Whom a contender is compared with: torch's of the same kind; a switch with our step without one."""
    if name.startswith("switch"):
        return "layer-sparse, foreach"
    if name.startswith("galore"):
        return "torch, foreach"
    return name.replace("layer-sparse", "torch") if name.startswith("layer-sparse") else ""


def line_up(base: nn.Module, layers: int, always_on: bool) -> tuple[dict[str, Runner], dict[str, str]]:
    """Build the contenders; those that do not give torch's parameters are left out."""
    ready: dict[str, Runner] = {}
    blocked: dict[str, str] = {}
    for way, how in WAYS.items():
        ours = sparse(base, LISA(layers, NEVER), always_on, "drop", **how)
        theirs = torchs(ours.model, **how)
        ready[f"torch, {way}"] = theirs
        if reason := difference(ours, theirs):
            blocked[f"layer-sparse, {way}"] = reason
        else:
            ready[f"layer-sparse, {way}"] = ours
    for policy in POLICIES:
        ready[f"switch, {policy}"] = sparse(base, LISA(layers, 1), always_on, policy, foreach=True)
    return ready, blocked


def sparse(base: nn.Module, schedule: LISA, always_on: bool, policy: Policy, **how: Any) -> Runner:
    """Ours, on a copy of the model."""
    model = copy.deepcopy(base)
    optimizer = LayerSparseAdamW(
        model, LR, schedule=schedule, on_deactivate=policy, always_on=None if always_on else (), **how
    )
    return Runner(model, optimizer)


def torchs(like: nn.Module, **how: Any) -> Runner:
    """torch's AdamW on a copy of what trains in `like`."""
    model = copy.deepcopy(like)
    return Runner(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, **how))


def galores(like: nn.Module) -> dict[str, Runner]:
    """GaLore's AdamW on copies of what trains in `like`."""
    made = {}
    for name, gap in (("galore", NEVER), ("galore, new projections", 1)):
        model = copy.deepcopy(like)
        made[name] = Runner(model, peers.galore(model, lr=LR, gap=gap))
    return made


def difference(ours: Runner, theirs: Runner) -> str | None:
    """What three steps of the two leave different, or None."""
    for runner in (ours, theirs):
        for _ in range(3):
            runner.give_gradients()
            runner.optimizer.step()
    pairs: list[tuple[tuple[str, Tensor], tuple[str, Tensor]]]
    pairs = list(zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True))
    wrong = [name for (name, mine), (_, other) in pairs if not torch.equal(mine, other)]
    return f"{len(wrong)} parameters differ from torch's, the first {wrong[0]}" if wrong else None


def show(title: str, samples: Samples, blocked: dict[str, str]) -> None:
    """Print the table."""
    rows = []
    for name, phases in samples.items():
        peer = peer_of(name)
        ratio = pairwise_ratio(phases["step"], samples[peer]["step"]) if peer in samples else None
        rows.append([
            name,
            report.milliseconds(Spread.of(phases["step"])),
            report.ratio(ratio),
            peer or "-",
        ])  # fmt: skip
    columns = ("contender", "optimizer.step ms", "time / other's", "the other")
    report.print_table(title, columns, rows, "medians ± half the interquartile range")
    for name, reason in blocked.items():
        report.console().print(f"[bold red]{name} is not timed[/bold red]: {reason}", soft_wrap=True)
