"""Suite `sparse`: layer-sparse training steps beside full fine-tuning and PEFT's LoRA.

`full` is torch's AdamW on everything; `hand-frozen` is torch's AdamW on what LISA trains in its first
interval, frozen by hand and never switched: what switching and bookkeeping cost shows against it. A contender
is timed only after its losses are bit for bit those of torch's AdamW on the same blocks. Peak is of all
tensors alive in a step (weights, gradients, moments, activations), over so many steps that blocks change.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from bench import contenders, layer_sparse, options, report
from bench.contenders import Contender
from bench.layer_sparse import HAND_FROZEN, Settings
from bench.measure import Phases, Samples, Spread, interleave, pairwise_ratio
from bench.models import DTYPES, WORKLOADS
from bench.step import Bytes, bytes_of, sized

PHASES = ("forward", "backward", "optimizer")


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("sparse", __doc__)
    add = arguments.add_argument
    add("--model", choices=WORKLOADS, default="llama-768", help="model and batch (default llama-768)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the model (default bfloat16)")
    add("--batch", type=options.positive, help="sequences a step, instead of the model's own")
    add("--sequence", type=options.positive, help="tokens a sequence, instead of the model's own")
    add("--layers", type=options.positive, default=2, help="blocks that train at a time (default 2)")
    add("--period", type=options.positive, default=10, help="steps from switch to switch (default 10)")
    add("--topk-layers", type=options.positive, nargs="*", default=[], metavar="K",
        help="also top-K with these numbers of blocks: time and bytes fall with K")  # fmt: skip
    add("--peft-ranks", type=options.positive, nargs="*", default=[16, 128],
        help="ranks of PEFT's LoRA beside them (default 16 128; nothing for none)")  # fmt: skip
    options.add_timing(arguments, rounds=20)
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a contender is not torch's AdamW on its blocks."""
    commands = parser()
    arguments = commands.parse_args(argv)
    workload = sized(WORKLOADS[arguments.model], arguments.batch, arguments.sequence)
    for option, layers in (("--layers", [arguments.layers]), ("--topk-layers", arguments.topk_layers)):
        if max(layers, default=0) > workload.layers:
            commands.error(f"argument {option}: {arguments.model} has {workload.layers} blocks")
    facts = report.begin("sparse", arguments)
    base = workload.build(DTYPES[arguments.dtype], device=arguments.device)
    ids = workload.batch_ids(device=arguments.device)
    settings = Settings(layers=arguments.layers, period=arguments.period, rank=16)
    ready, blocked = line_up(base, ids, settings, arguments.peft_ranks, arguments.topk_layers)
    kept = {name: bytes_of(contender, settings) for name, contender in ready.items()}
    total = len(ready) * (arguments.warmup + arguments.rounds)
    runs: dict[str, Callable[[], Phases]] = {name: contender.step for name, contender in ready.items()}
    with report.progress("sparse", total) as advance:
        samples = interleave(runs, rounds=arguments.rounds, warmup=arguments.warmup, on_run=advance)
    title = (
        f"{arguments.model}, {workload.batch}x{workload.sequence} tokens, {arguments.dtype}, "
        f"{arguments.layers} of {workload.layers} blocks, period {arguments.period}"
    )
    show(title, samples, kept, blocked)
    if arguments.json:
        case = {"model": arguments.model, "batch": workload.batch, "sequence": workload.sequence,
                "dtype": arguments.dtype, "layers": arguments.layers, "blocks": workload.layers,
                "period": arguments.period}  # fmt: skip
        records: list[report.Record] = [
            {**case, "contender": name, "peer": "full", "seconds": samples[name],
             "saved_bytes": kept[name].saved, "peak_bytes": kept[name].peak,
             "moments_bytes": kept[name].moments}
            for name in samples
        ]  # fmt: skip
        records += [{**case, "contender": name, "blocked": reason} for name, reason in blocked.items()]
        report.write_json(arguments.json, report.command_line("sparse", argv), facts, records)
    return int(bool(blocked))


def line_up(
    base: nn.Module,
    ids: Tensor,
    settings: Settings,
    peft_ranks: Sequence[int],
    topk_layers: Sequence[int],
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Build the contenders; those whose losses are not torch's on the same parameters are left out."""
    ready = {"full": contenders.full(base, ids)}
    blocked: dict[str, str] = {}
    wanted = [(name, name, settings) for name in layer_sparse.METHODS]
    wanted += [(f"topk k={k}", "topk", replace(settings, layers=k)) for k in topk_layers]
    for name, method, its_settings in wanted:
        try:
            ours, theirs = layer_sparse.build(method, base, ids, its_settings)
        except RuntimeError as error:
            blocked[name] = str(error)
            continue
        if name == "lisa":
            ready[HAND_FROZEN] = theirs
        ready[name] = ours
    for rank in peft_ranks:
        ready[f"peft-lora r={rank}"] = contenders.build("peft-lora", base, ids, rank)
    return ready, blocked


def show(title: str, samples: Samples, kept: dict[str, Bytes], blocked: dict[str, str]) -> None:
    """Print the table."""
    pefts = [name for name in samples if name.startswith("peft-")]

    def over(name: str, other: str) -> Spread:
        return pairwise_ratio(samples[name]["step"], samples[other]["step"])

    rows = []
    for name, phases in samples.items():
        found = kept[name]
        rows.append([
            name,
            report.milliseconds(Spread.of(phases["step"])),
            f"{sum(phases['step']) / sum(samples['full']['step']):.2f}",
            report.ratio(over(name, "full")),
            *(f"{over(peer, name).median:.2f}" for peer in pefts),
            *(f"{1e3 * Spread.of(phases[phase]).median:.0f}" for phase in PHASES),
            report.mebibytes(found.moments),
            report.mebibytes(found.saved),
            "-" if found.peak is None else report.mebibytes(found.peak),
        ])  # fmt: skip
    columns = ("contender", "step ms", "mean / full's", "time / full's",
               *(f"speed / PEFT's {peer.partition(' ')[2]}" for peer in pefts),
               "fwd ms", "bwd ms", "opt ms", "moments MiB", "saved MiB", "peak MiB")  # fmt: skip
    note = "moments: alive after a step; saved: kept for backward; peak: of all tensors in a step"
    report.print_table(title, columns, rows, note)
    for name, reason in blocked.items():
        report.console().print(f"[bold red]{name} is not timed[/bold red]: {reason}", soft_wrap=True)
