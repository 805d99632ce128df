"""Every method on one model and text: what each learns in equal steps and in equal time, and what it holds.

    python examples/compare.py                      SmolLM2-135M on Shakespeare, three seeds, about an hour
    python examples/compare.py --methods lora lisa --seeds 1 --steps 20
    python examples/compare.py --help

Step times are measured first, side by side. Each method's learning rate is then chosen on text apart
from the training and from the held-out text, and it trains for `--steps` steps and, beyond them, for as many
as full fine-tuning's time allows. What is done is kept in the results file: a run
that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from rich.console import Console
from rich.table import Table

import corpus
import dtypes
import finetune
import shakespeare
import smollm2
from errors import InputError, exit_code
from methods import METHODS
from options import ROOT
from report import say
from results import Results

MIB = 2**20
WARMUP = 0.1  # of the steps; constant after it, so that a longer run begins as a shorter one does
TUNING_SEED = 1000
MOST_RATES = 7
SCORED = 2048  # held-out tokens; the same for all methods and seeds
ROUNDS = 10  # of the timing, after one that does not count: two of the schedules' periods
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95%, by the number of seeds


@dataclass
class Job:
    """The model, the text and the sizes that all methods share."""

    folder: Path
    dtype: str
    rows: torch.Tensor
    tuning_rows: torch.Tensor
    held_out: torch.Tensor
    steps: int
    batch: int

    def build(self, name: str, rate: float, seed: int) -> Run:
        """A fresh model under a method."""
        model = finetune.load_model(self.folder, self.dtype).train()
        return Run(model, METHODS[name].build(model, rate, seed), self, seed)


class Run:
    """One method in training."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, job: Job, seed: int) -> None:
        self.model, self.optimizer, self.job = model, optimizer, job
        warmup = max(1, round(WARMUP * job.steps))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / warmup))
        self._draw = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long)
        self.gradient_bytes = 0

    def step(self) -> None:
        """One step on the next windows; every window once before any comes again."""
        while len(self._order) < self.job.batch:
            self._order = torch.cat([self._order, torch.randperm(len(self.job.rows), generator=self._draw)])
        batch, self._order = self.job.rows[self._order[: self.job.batch]], self._order[self.job.batch :]
        self.model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, finetune.MAX_GRAD_NORM)
        self.gradient_bytes = max(self.gradient_bytes, sum(p.grad.nbytes for p in parameters))
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad()

    def loss_on(self, rows: torch.Tensor) -> float:
        """Mean loss on rows, in nats a token."""
        loss = finetune.mean_loss(self.model, rows)
        self.model.train()
        return loss

    def memory(self) -> dict[str, int]:
        """Bytes by component: weights, the most gradients seen, moments now, kept for backward."""
        values = [v for state in self.optimizer.state.values() for v in state.values()]
        return {
            "weights": sum(p.nbytes for p in self.model.parameters()),
            "gradients": self.gradient_bytes,
            "moments": sum(v.nbytes for v in values if isinstance(v, torch.Tensor) and v.dim()),
            "activations": self._kept_for_backward(),
        }

    def _kept_for_backward(self) -> int:
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = self.job.rows[: self.job.batch]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        del loss
        return sum(kept.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a causal language model; default SmolLM2-135M")
    add(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to learn, its last tenth held out; default Shakespeare",
    )
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=int, choices=range(1, 6), default=3)
    add("--steps", type=int, default=40)
    add("--tuning-steps", type=int, default=20)
    add("--batch", type=int, default=2)
    add("--sequence", type=int, default=128)
    add("--dtype", choices=dtypes.DTYPES, help=dtypes.HELP)
    add("--out", type=Path, default=Path("runs/compare"))
    add("--cache", type=Path, default=ROOT / ".cache")
    o = parser.parse_args(argv)
    o.dtype = o.dtype or dtypes.quickest()
    transformers.utils.logging.disable_progress_bar()
    return exit_code("compare.py", lambda: compare(o), goes_on=True)


def compare(o: argparse.Namespace) -> int:
    """Choose the rates, time the steps, train everything, print and draw."""
    if min(o.steps, o.tuning_steps, o.batch) < 1 or o.sequence < 2:
        raise InputError("--steps, --tuning-steps and --batch: expected at least 1; --sequence: at least 2")
    for folder, option in ((o.out, "--out"), (o.cache, "--cache")):
        finetune.make_folder(folder, option)
    finetune.check_model(o.model)
    job = prepare(o)
    settings = {
        "steps": o.steps, "tuning_steps": o.tuning_steps, "batch": o.batch, "sequence": o.sequence,
        "dtype": o.dtype, "model": job.folder.name, "threads": torch.get_num_threads(),
    }  # fmt: skip
    results = Results(o.out / "compare.json", settings)
    key = " ".join(o.methods)
    seconds = results.get("seconds", key, make=partial(timed, job, o.methods))
    longest = seconds.get("full", max(seconds.values()))
    rates = {
        name: results.get("rate", name, make=partial(tune, job, name, o.tuning_steps, results))
        for name in o.methods
    }
    for seed in range(o.seeds):
        for name in o.methods:
            more = max(0, math.floor(o.steps * longest / seconds[name]) - o.steps)
            train = partial(trained, job, name, rates[name], seed, more)
            results.get("runs", name, str(seed), make=train)
    rows = summary(results.found, o.methods, seconds, o.seeds)
    show(rows, results, job)
    draw(rows, o.out / "compare.png")
    say(f"picture  {o.out / 'compare.png'}\nresults  {o.out / 'compare.json'}")
    return 0


def prepare(o: argparse.Namespace) -> Job:
    """Load the text, and hold a part of the training text back for the choice of learning rates."""
    text = corpus.from_file(o.text) if o.text else shakespeare.load(o.cache, say)
    folder = o.model or smollm2.prepare(o.cache, say)
    model = finetune.load_model(folder, o.dtype)
    rows, parts = finetune.tokenize(text, finetune.load_tokenizer(folder), model, o.sequence)
    held_out = corpus.spread(torch.cat(list(parts.values())), max(1, SCORED // o.sequence))
    few = min(len(held_out), max(1, len(rows) // 10))
    return Job(folder, o.dtype, rows[:-few], rows[-few:], held_out, o.steps, o.batch)


def tune(job: Job, name: str, steps: int, results: Results) -> float:
    """The learning rate of lowest loss after a few steps: of the method's, and beyond where an end won."""
    losses: dict[float, float] = {}

    def loss_at(rate: float) -> float:
        run = job.build(name, rate, TUNING_SEED)
        for _ in range(steps):
            run.step()
        return run.loss_on(job.tuning_rows)

    todo = list(METHODS[name].rates)
    while todo:
        rate = todo.pop(0)
        losses[rate] = results.get("tuning", name, f"{rate:g}", make=partial(loss_at, rate))
        best = min(losses, key=lambda known: (not math.isfinite(losses[known]), losses[known]))
        if not todo and len(losses) < MOST_RATES and best in (min(losses), max(losses)):
            todo.append(best / 2 if best == min(losses) else best * 2)
    found = ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in sorted(losses.items()))
    say(f"rate of {name}: {found} -> {best:g}")
    return best


def timed(job: Job, names: Sequence[str]) -> dict[str, float]:
    """Mean seconds of a step, the methods' steps one after the other in each round."""
    runs = {name: job.build(name, METHODS[name].rates[0], TUNING_SEED) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + ROUNDS):
        for name, run in runs.items():
            gc.collect()
            run.step() if number == 0 else None
            began = time.perf_counter()
            run.step()
            if number:
                spent[name].append(time.perf_counter() - began)
    found = {name: statistics.mean(values) for name, values in spent.items()}
    say("seconds a step: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def trained(job: Job, name: str, rate: float, seed: int, more: int) -> dict[str, Any]:
    """One run: held-out loss after the steps, and after what full fine-tuning's time allows besides."""
    run = job.build(name, rate, seed)
    for _ in range(job.steps):
        run.step()
    at_steps = run.loss_on(job.held_out)
    for _ in range(more):
        run.step()
    at_time = run.loss_on(job.held_out) if more else at_steps
    say(
        f"{name}, seed {seed}: {at_steps:.4f} after {job.steps} steps, {at_time:.4f} after {job.steps + more}"
    )
    return {"equal_steps": at_steps, "equal_time": at_time, "steps": job.steps + more, "memory": run.memory()}


def summary(
    found: dict[str, Any], methods: list[str], seconds: dict[str, float], seeds: int
) -> list[dict[str, Any]]:
    """One row a method: means, half of the 95% interval, memory."""
    rows = []
    for name in methods:
        runs = [found["runs"][name][str(seed)] for seed in range(seeds)]
        row: dict[str, Any] = {"method": name, "rate": found["rate"][name], "seconds": seconds[name]}
        for key in ("equal_steps", "equal_time"):
            losses = [run[key] for run in runs]
            row[key] = statistics.mean(losses)
            spread = statistics.stdev(losses) if seeds > 1 else 0.0
            row[f"{key}_interval"] = STUDENT_95.get(seeds, 0.0) * spread / math.sqrt(seeds)
        row["steps"] = runs[0]["steps"]
        row["memory"] = {part: max(run["memory"][part] for run in runs) for part in runs[0]["memory"]}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], results: Results, job: Job) -> None:
    """Print the table."""
    before = results.get(
        "before", make=lambda: finetune.mean_loss(finetune.load_model(job.folder, job.dtype), job.held_out)
    )
    table = Table(title=f"held-out loss before training {before:.4f}, nats a token; ± is half a 95% interval")
    for column in ("method", "rate", f"after {job.steps} steps", "in equal time", "steps", "s/step",
                   "weights MiB", "gradients", "moments", "kept for backward", "sum"):  # fmt: skip
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        losses = [f"{row[key]:.4f} ±{row[f'{key}_interval']:.4f}" for key in ("equal_steps", "equal_time")]
        held = [value / MIB for value in row["memory"].values()]
        sizes = [f"{value:.0f}" for value in (*held, sum(held))]
        table.add_row(
            row["method"], f"{row['rate']:g}", *losses, str(row["steps"]), f"{row['seconds']:.2f}", *sizes
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses with their intervals, and the bytes by component, into a PNG file."""
    matplotlib.use("Agg")  # draws into files; needs no display
    from matplotlib import pyplot  # after the choice of backend

    names = [row["method"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for shift, key, label in ((-0.15, "equal_steps", "equal steps"), (0.15, "equal_time", "equal time")):
        places = [i + shift for i in range(len(rows))]
        errors = [row[f"{key}_interval"] for row in rows]
        left.errorbar([row[key] for row in rows], places, xerr=errors, fmt="o", capsize=3, label=label)
    left.set(yticks=range(len(rows)), yticklabels=names, xlabel="held-out loss, nats a token")
    left.invert_yaxis()
    left.legend()
    edge = [0.0] * len(rows)
    for part in rows[0]["memory"]:
        sizes = [row["memory"][part] / MIB for row in rows]
        right.barh(range(len(rows)), sizes, left=edge, label=part)
        edge = [a + b for a, b in zip(edge, sizes, strict=True)]
    right.set(xlabel="MiB")
    right.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
