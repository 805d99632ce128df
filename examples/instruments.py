"""Figures of three papers, on one model and text: weight norms, magnitude and direction, removed adapters.

    python examples/instruments.py                  SmolLM2-135M on Shakespeare, six minutes
    python examples/instruments.py --model FOLDER --text FILE
    python examples/instruments.py --help

Full fine-tuning, LoRA and DoRA train for `--steps` steps each. While they do, the mean weight norm of every
layer is recorded (LISA, figure 2); afterwards it is measured how far each query projection moved in
magnitude and direction (DoRA, figure 2); and of LoRA's model the adapters are taken away block by block,
greedily and at random (IST, figure 2). What trains and what it holds is printed for each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import corpus
import fastpeft
import finetune
import shakespeare
import smollm2
from errors import InputError, exit_code
from fastpeft import instruments
from fastpeft.instruments import plots
from fastpeft.targets import repeated_blocks
from options import ROOT
from report import progress, say

KIND = "q_proj"  # the weights of DoRA's figure; where a model has none of this name, all in the blocks
METHODS: dict[str, tuple[float, fastpeft.LoRA | None]] = {
    "full": (5e-5, None),
    "lora": (2e-3, fastpeft.LoRA(r=16, lora_alpha=32)),
    "dora": (2e-3, fastpeft.LoRA(r=16, lora_alpha=32, use_dora=True)),
}


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    arguments = argparse.ArgumentParser(
        prog="instruments.py", description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = arguments.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a transformers model; without it SmolLM2-135M-Instruct")
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to learn; without it Shakespeare's plays")
    add("--steps", type=int, default=20, help="optimiser steps of each method")
    add("--batch", type=int, default=2, help="sequences a step")
    add("--sequence", type=int, default=64, help="tokens a sequence")
    add("--removals", type=int, help="blocks whose adapters are taken away; without it all")
    add("--seed", type=int, default=0, help="equal seeds repeat a run on the same machine")
    add("--out", type=Path, default=Path("runs/instruments"), metavar="DIR", help="gets figures and numbers")
    add("--cache", type=Path, default=ROOT / ".cache", metavar="DIR", help="the converted model, the plays")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 0, or 2 and one line for wrong input."""
    o = parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    return exit_code("instruments.py", lambda: run(o))


def run(o: argparse.Namespace) -> int:
    """Train, measure and draw."""
    for name, least in (("steps", 1), ("batch", 1), ("sequence", 2), ("removals", 1)):
        if getattr(o, name) is not None and getattr(o, name) < least:
            raise InputError(f"--{name}: expected at least {least}, got {getattr(o, name)}")
    began = time.perf_counter()
    finetune.make_folder(o.out, "--out")
    finetune.check_model(o.model)
    finetune.make_folder(o.cache, "--cache")
    text = corpus.from_file(o.text) if o.text else shakespeare.load(o.cache, say)
    folder = o.model or smollm2.prepare(o.cache, say)
    base = finetune.load_model(folder, "fp32").eval()
    blocks = sum(1 for _ in repeated_blocks(base))
    if o.removals is not None and o.removals > blocks:
        raise InputError(f"--removals: expected at most {blocks}, the model's blocks, got {o.removals}")
    rows, held_out = finetune.tokenize(text, finetune.load_tokenizer(folder), base, o.sequence)
    scored = corpus.spread(torch.cat(list(held_out.values())), o.batch)
    say(f"{folder.resolve().name} on {text.name}, {o.steps} steps of {o.batch}x{o.sequence} tokens, fp32")

    norms: dict[str, dict[str, float]] = {}
    changes: dict[str, list[instruments.Change]] = {}
    curves: dict[str, instruments.Removal] = {}
    accounts: dict[str, dict[str, Any]] = {}
    for name, (rate, config) in METHODS.items():
        torch.manual_seed(o.seed)
        model = finetune.load_model(folder, "fp32")
        if config is not None:
            fastpeft.patch(model, config)
        recorder = instruments.WeightNorms(model)
        say(f"\n{name} ...")
        account = trained(model, rate, rows, o, recorder)
        say(str(account))
        accounts[name] = asdict(account)
        norms[name] = recorder.mean()
        names = [KIND] if any(path.endswith(f".{KIND}") for path, _ in model.named_modules()) else None
        changes[name] = instruments.changes_between(base, model, names=names)
        say(f"correlation of ΔD and ΔM: {instruments.correlation(changes[name]):+.2f}")
        if name == "lora":
            curves = removed(model, scored, o)
        del model
    plots.plot_weight_norms(norms, o.out / "weight_norms.png")
    plots.plot_changes(changes, o.out / "changes.png")
    plots.plot_removal(curves, o.out / "removal.png")
    figures = {
        "steps": o.steps, "batch": o.batch, "sequence": o.sequence, "seed": o.seed,
        "weight_norms": norms,
        "changes": {name: [asdict(change) for change in found] for name, found in changes.items()},
        "correlation": {name: instruments.correlation(found) for name, found in changes.items()},
        "removal": {name: asdict(curve) for name, curve in curves.items()},
        "accounts": accounts,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    (o.out / "instruments.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    say(f"\nfigures   {o.out}/weight_norms.png, changes.png, removal.png; numbers in instruments.json")
    say(f"time      {figures['seconds']:.0f} s")
    return 0


def trained(
    model: Any, rate: float, rows: torch.Tensor, o: argparse.Namespace, recorder: instruments.WeightNorms
) -> instruments.Account:
    """Train, with the norms recorded after each step; returns the account before the last ``zero_grad``."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    recorder.attach(optimizer)
    order = torch.randint(len(rows), (o.steps, o.batch), generator=torch.Generator().manual_seed(o.seed))
    model.train()
    with progress(o.steps, o.batch * o.sequence) as advance:
        for batch in rows[order]:
            optimizer.zero_grad()
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            advance(loss.item())
    return instruments.account(model, optimizer)


def removed(model: Any, rows: torch.Tensor, o: argparse.Namespace) -> dict[str, instruments.Removal]:
    """Take LoRA's adapters away, greedily and at random, and watch the held-out loss."""

    def loss(of: Any, batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = of(input_ids=batch, labels=batch, use_cache=False).loss
        return found

    found = {
        "greedy": instruments.greedy_removal(
            model, loss, [rows], count=o.removals, progress=told("greedy removal")
        ),
        "random": instruments.random_removal(model, loss, [rows], count=o.removals, seed=o.seed),
    }
    first = found["greedy"]
    say(f"held-out loss {first.losses[0]:.3f} with all adapters, {first.losses[-1]:.3f} after "
        f"{len(first.order)} removals; least missed: {', '.join(first.order[:3])}")  # fmt: skip
    return found


def told(what: str, lines: int = 5) -> Callable[[int, int], None]:
    """A line now and then."""

    def progress(done: int, total: int) -> None:
        if done == total or done % max(1, total // lines) == 0:
            say(f"  {what}: {done}/{total} evaluations")

    return progress


if __name__ == "__main__":
    sys.exit(main())
