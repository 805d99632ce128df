"""Saves adapters in processes that are killed: `python kill_worker.py`, a line of stdin for each.

    FOLDER KIND OPERATION      one save that kills itself before its file operation of this number
    FOLDER loop                saves of all kinds in turn, until somebody kills it

It answers with the process's number, and, once that has ended, with "killed" or "done".
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import fastpeft

# Ranks, alphas and values; 1 has another configuration than 0, and 2 has that of 0.
KINDS = ((4, 8, 1.0), (8, 9, 2.0), (4, 8, 3.0))
_CHANGES = ("os.", "open", "shutil.", "tempfile.")


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def make_model(kind: int) -> nn.Module:
    r, alpha, value = KINDS[kind]
    model = base()
    fastpeft.patch(model, fastpeft.LoRA(r=r, lora_alpha=alpha, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.constant_(parameter, value)
    return model


def kill_before(operation: int) -> None:
    """Python tells hooks of every call that opens, renames, links or removes a file."""
    counter = itertools.count()

    def hook(event: str, _: object) -> None:
        if event.startswith(_CHANGES) and next(counter) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def save(folder: Path, what: list[str], models: list[nn.Module]) -> None:
    if what[0] == "loop":
        for model in itertools.cycle(models):
            fastpeft.save(model, folder)
    model = models[int(what[0])]
    kill_before(int(what[1]))
    fastpeft.save(model, folder)


def main() -> None:
    torch.set_num_threads(1)
    models = [make_model(kind) for kind in range(len(KINDS))]
    with tempfile.TemporaryDirectory() as folder:  # so that nothing is imported in what follows
        for model in models:
            fastpeft.save(model, folder)
    print("ready", flush=True)
    for line in sys.stdin:
        folder, *what = line.split()
        if not (child := os.fork()):
            try:
                save(Path(folder), what, models)
            finally:
                os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "done", flush=True)


if __name__ == "__main__":
    main()
