"""Suite `step`: whole training steps, fastpeft, PEFT and others side by side.

A step is forward with labels, backward, AdamW step, zero_grad. `frozen` is the floor: the frozen base's
forward and full input-gradient backward without adapters or optimiser; `full` is full fine-tuning; `lisa`,
`badam` and `ist` train a few blocks at a time (suite `sparse` has more on them). `galore` and `lomo` are full
fine-tuning by other optimisers (GaLore makes its projections anew every 200 steps, none of which is timed).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bench import adapter_files, contenders, layer_sparse, optimizer_peers, options, parity, report
from bench.contenders import Contender
from bench.layer_sparse import Settings
from bench.measure import Samples, Spread, interleave, pairwise_ratio
from bench.models import DTYPES, WORKLOADS, Workload
from bench.records import method_of

PHASES = ("step", "forward", "backward", "optimizer")
SPARSE = ("lisa", "badam", "ist")
CORE = (*contenders.NAMES, *SPARSE)
PEERS = (*contenders.PEER_NAMES, *optimizer_peers.PEERS)
NAMES = (*CORE, *PEERS)
GROUPS = {"core": CORE, "peers": PEERS, "all": NAMES}
GATED = (*contenders.SIDES, *contenders.PEERS)


@dataclass(kw_only=True)
class Lineup:
    """The contenders that may be timed, and why the others may not."""

    ready: dict[str, Contender] = field(default_factory=dict)
    """Contenders by the label of their table row."""
    blocked: dict[str, str] = field(default_factory=dict)
    """Reasons by contender."""
    checks: dict[str, list[parity.Check]] = field(default_factory=dict)
    """What the parity gate compared, by contender."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """What a contender keeps."""

    saved: int
    peak: int | None
    moments: int


def parser() -> argparse.ArgumentParser:
    """The suite's options."""
    arguments = options.Parser("step", __doc__)
    add = arguments.add_argument
    add("--model", choices=WORKLOADS, default="llama-768", help="model and batch (default llama-768)")
    add("--ranks", type=options.positive, nargs="+", default=[16, 64], help="adapter ranks (default 16 64)")
    add("--contenders", nargs="+", choices=(*GROUPS, *NAMES), default=["core"], metavar="NAME",
        help=f"which to run, in this order; a name given twice shows the noise. Of: {', '.join(NAMES)}; "
        f"or core (default), peers, all")  # fmt: skip
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the base (default bfloat16)")
    add("--batch", type=options.positive, help="sequences a step, instead of the model's own")
    add("--sequence", type=options.positive, help="tokens a sequence, instead of the model's own")
    add("--layers", type=options.positive, default=2, help="blocks of lisa and ist (default 2)")
    add("--period", type=options.positive, default=10, help="steps from switch to switch (default 10)")
    options.add_timing(arguments, rounds=10)
    options.add_common(arguments)
    return arguments


def main(argv: Sequence[str]) -> int:
    """Run the suite; 1 if a contender failed its parity check or broke."""
    commands = parser()
    arguments = commands.parse_args(argv)
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    workload = sized(WORKLOADS[arguments.model], arguments.batch, arguments.sequence)
    if arguments.layers > workload.layers:
        commands.error(f"argument --layers: {arguments.model} has {workload.layers} blocks")
    names, absent = chosen(arguments.contenders, device)
    for name, reason in absent.items():
        if name in arguments.contenders:
            commands.error(f"argument --contenders: {name} cannot run here: {reason}")
    facts = report.begin("step", arguments)
    base, ids = workload.build(dtype, device=device), workload.batch_ids(device=device)
    records: list[report.Record] = []
    failed = False
    for rank in arguments.ranks:
        title = f"{arguments.model}, {workload.batch}x{workload.sequence} tokens, {arguments.dtype}, r={rank}"
        settings = Settings(layers=arguments.layers, period=arguments.period, rank=rank)
        lineup = line_up(names, base, ids, settings, dtype)
        failed = failed or bool(lineup.blocked)
        lineup.blocked |= {name: f"cannot run here: {reason}" for name, reason in absent.items()}
        kept = {name: bytes_of(contender, settings) for name, contender in lineup.ready.items()}
        total = len(lineup.ready) * (arguments.warmup + arguments.rounds)
        with report.progress(f"step r={rank}", total) as advance:
            runs = {name: contender.step for name, contender in lineup.ready.items()}
            samples = interleave(runs, rounds=arguments.rounds, warmup=arguments.warmup, on_run=advance)
        show(title, workload, samples, kept, lineup)
        for name in (*lineup.ready, *lineup.blocked):
            found = kept.get(name)
            records.append(
                {"model": arguments.model, "batch": workload.batch, "sequence": workload.sequence,
                 "dtype": arguments.dtype, "rank": rank, "contender": name,
                 "peer": "full" if name in (*SPARSE, *optimizer_peers.PEERS) else None,
                 "seconds": samples.get(name, {}), "saved_bytes": found and found.saved,
                 "peak_bytes": found and found.peak, "moments_bytes": found and found.moments,
                 "blocked": lineup.blocked.get(name),
                 "parity": [{"quantity": c.quantity, "error": c.error, "peft": c.peer_error}
                            for c in lineup.checks.get(name, [])]}
            )  # fmt: skip
    if arguments.json:
        report.write_json(arguments.json, report.command_line("step", argv), facts, records)
    return int(failed)


def sized(workload: Workload, batch: int | None, sequence: int | None) -> Workload:
    """`workload` with another batch."""
    return replace(workload, batch=batch or workload.batch, sequence=sequence or workload.sequence)


def chosen(words: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The contenders that the words name, and of those the reasons of the ones that cannot run here."""
    names = [name for word in words for name in GROUPS.get(word, (word,))]
    reasons = {
        name: optimizer_peers.missing(name)
        if name in optimizer_peers.PEERS
        else contenders.missing(name, device)
        for name in dict.fromkeys(names)
    }
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in names if name not in absent], absent


def line_up(
    names: Sequence[str], base: nn.Module, ids: Tensor, settings: Settings, dtype: torch.dtype
) -> Lineup:
    """Build the contenders and let those with adapters through the parity gate.

    PEFT's contender of the same method is the yardstick, and is built even when it is not asked for.
    """
    lineup = Lineup()
    yardsticks: dict[str, tuple[Contender, parity.Outcome, parity.Outcome]] = {}
    with report.progress(f"build and check r={settings.rank}", len(names)) as advance:
        for name in names:
            advance(name)
            label = name
            while label in lineup.ready or label in lineup.blocked:
                label += " again"
            try:
                if name in layer_sparse.METHODS:
                    lineup.ready[label] = layer_sparse.build(name, base, ids, settings)[0]
                    continue
                if name in optimizer_peers.PEERS:
                    lineup.ready[label] = optimizer_peers.build(name, base, ids)
                    continue
                contender = contenders.build(name, base, ids, settings.rank)
                method = method_of(name)
                if method and name != f"peft-{method}":
                    if method not in yardsticks:
                        peer = contenders.build(f"peft-{method}", base, ids, settings.rank)
                        wide = parity.truth(peer, parity.wider(dtype))
                        yardsticks[method] = (peer, wide, parity.outcome(peer))
                    peer, wide, peers = yardsticks[method]
                    adapter_files.copy(peer.model, contender.model)
                    lineup.checks[label] = parity.compare(wide, peers, parity.outcome(contender), dtype)
                    reason = parity.failure(lineup.checks[label])
                    if reason:
                        lineup.blocked[label] = f"parity: {reason}"
                        continue
                lineup.ready[label] = contender
            except Exception as error:  # a contender that cannot run is a row of the table, with its reason
                lineup.blocked[label] = f"cannot run: {type(error).__name__}: {error}".splitlines()[0]
    return lineup


def bytes_of(contender: Contender, settings: Settings) -> Bytes:
    """What the contender keeps for backward, at most, and as moments after a step."""
    kept = contender.saved_bytes()
    peak: int | None
    peak, moments = layer_sparse.step_bytes(contender, settings)
    if "compiled" in contender.name:
        peak = None  # its buffers are in no operator's result
    return Bytes(saved=kept, peak=peak, moments=moments)


def show(title: str, workload: Workload, samples: Samples, kept: dict[str, Bytes], lineup: Lineup) -> None:
    """Print the table, then what the gate found."""
    rows = []
    for name in samples:
        step = samples[name]["step"]
        method = method_of(name)
        peer = f"peft-{method}"
        found = kept[name]
        rows.append([
            name,
            f"{workload.tokens / Spread.of(step).median:.0f}",
            report.milliseconds(Spread.of(step)),
            *(f"{1e3 * Spread.of(samples[name][phase]).median:.0f}" for phase in PHASES[1:]),
            report.ratio(over(samples, peer, name) if method else None),
            report.ratio(over(samples, name, "frozen")),
            report.ratio(over(samples, name, "full")),
            report.mebibytes(found.saved),
            f"{found.saved / kept[peer].saved:.0%}" if method and peer in kept else "-",
            "-" if found.peak is None else report.mebibytes(found.peak),
        ])  # fmt: skip
    rows += [[name, *["-"] * 10, reason.partition(":")[0]] for name, reason in lineup.blocked.items()]
    columns = ("contender", "tokens/s", "step ms", "fwd ms", "bwd ms", "opt ms", "speed / PEFT's",
               "time / frozen", "time / full", "saved MiB", "of PEFT's", "peak MiB")  # fmt: skip
    note = (
        "medians ± half the interquartile range; ratios taken round by round; saved: bytes kept for "
        "backward; peak: of all tensors in a step"
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
