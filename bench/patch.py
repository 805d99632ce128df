"""Suite `patch`: how long it takes to put adapters on a model, beside PEFT's `get_peft_model`.

The model is on the meta device, so no weight is computed: what remains is finding, replacing and naming
modules. `inplace` is `fastpeft.patch` of a model that PEFT has wrapped already. Every contender must give
adapters of PEFT's number and sizes.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bench import options, report
from bench.adapter import Adapter
from bench.clock import Stopwatch
from bench.measure import Phases, Samples, Spread, interleave, pairwise_ratio
from bench.models import WORKLOADS

Patch = Callable[[nn.Module], nn.Module]


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("patch", __doc__)
    add = arguments.add_argument
    add("--model", choices=WORKLOADS, default="llama-2-7b", help="shape (default llama-2-7b)")
    add("--rank", type=options.positive, default=16, help="adapter rank (default 16)")
    options.add_timing(arguments, rounds=5, warmup=1)
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a contender's adapters are not PEFT's in number or size."""
    arguments = parser().parse_args(argv)
    facts = report.begin("patch", arguments)
    with torch.device("meta"):
        base = WORKLOADS[arguments.model].build(torch.bfloat16)
    runs: dict[str, Callable[[], Phases]] = {}
    blocked: dict[str, str] = {}
    for dora in (False, True):
        adapter = Adapter(rank=arguments.rank, dora=dora)
        wrap, ours, in_place = _peft(adapter), _fastpeft(adapter), _in_place()
        expected = trainable(wrap(copy.deepcopy(base)))
        contenders: dict[str, tuple[Patch, Patch]] = {
            "peft": (_nothing, wrap), "fastpeft": (_nothing, ours), "inplace": (wrap, in_place)
        }  # fmt: skip
        for side, (before, patch) in contenders.items():
            name = f"{side}-{adapter.method}"
            found = trainable(patch(before(copy.deepcopy(base))))
            if found != expected:
                blocked[name] = f"adapters: {found[0]} of {found[1]} numbers, PEFT has {expected}"
            else:
                runs[name] = _timed(base, before, patch)
    with report.progress("patch", len(runs) * (arguments.warmup + arguments.rounds)) as advance:
        samples = interleave(runs, rounds=arguments.rounds, warmup=arguments.warmup, on_run=advance)
    title = f"{arguments.model} on the meta device, r={arguments.rank}, every linear of the blocks"
    show(title, samples, blocked)
    if arguments.json:
        case = {"model": arguments.model, "rank": arguments.rank}
        records: list[report.Record] = [
            {**case, "contender": name, "seconds": seconds} for name, seconds in samples.items()
        ]
        records += [{**case, "contender": name, "blocked": reason} for name, reason in blocked.items()]
        report.write_json(arguments.json, report.command_line("patch", argv), facts, records)
    return int(bool(blocked))


def trainable(model: nn.Module) -> tuple[int, int]:
    """How many tensors train, and their elements."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    return len(sizes), sum(sizes)


def _timed(base: nn.Module, before: Patch, patch: Patch) -> Callable[[], Phases]:
    def run() -> Phases:
        model = before(copy.deepcopy(base))
        watch = Stopwatch(torch.device("cpu"))
        patch(model)
        watch.mark("all")
        return {"patch": watch.phases("patch")["patch"]}

    return run


def _nothing(model: nn.Module) -> nn.Module:
    return model


def _peft(adapter: Adapter) -> Patch:
    from peft import LoraConfig, get_peft_model

    def patch(model: Any) -> nn.Module:
        config = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, use_dora=adapter.dora, target_modules="all-linear"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # an attribute that transformers renamed
            return get_peft_model(model, config)  # type: ignore[no-any-return]

    return patch


def _fastpeft(adapter: Adapter) -> Patch:
    import fastpeft

    config = fastpeft.LoRA(r=adapter.rank, lora_alpha=adapter.alpha, use_dora=adapter.dora)
    return lambda model: fastpeft.patch(model, config)


def _in_place() -> Patch:
    import fastpeft

    return lambda model: fastpeft.patch(model)


def show(title: str, samples: Samples, blocked: dict[str, str]) -> None:
    """Print the table."""
    rows = []
    for name, phases in samples.items():
        peer = f"peft-{name.rpartition('-')[2]}"
        rows.append([
            name,
            report.milliseconds(Spread.of(phases["patch"])),
            report.ratio(pairwise_ratio(samples[peer]["patch"], phases["patch"])),
        ])  # fmt: skip
    columns = ("contender", "ms", "speed of get_peft_model's")
    report.print_table(title, columns, rows, "medians ± half the interquartile range")
    for name, reason in blocked.items():
        report.console().print(f"[bold red]{name} is not timed[/bold red]: {reason}", soft_wrap=True)
