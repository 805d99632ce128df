"""A training that stops or is killed: `training_worker go FOLDER FIRST STEPS`, or `save FOLDER`.

`go` trains from step FIRST (above 0: from the folder), saves into the folder and prints its losses; `save`
trains and saves after every step until somebody kills it.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

import fastpeft
from fastpeft import LISA, LayerSparseAdamW


def make():
    """A few adapted linears with dropout; no transformers, which takes long to import."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)))
    fastpeft.patch(model, fastpeft.LoRA(r=2, lora_dropout=0.2, target_modules="all-linear"))
    optimizer = LayerSparseAdamW(model.train(), 1e-2, 0.1, LISA(2, 3, seed=5))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 6], gamma=0.5)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, first, steps, after=lambda step: None):
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(0)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(step + 1)
    return losses


def main() -> None:
    what, folder, *numbers = sys.argv[1:]
    model, optimizer, scheduler = make()
    torch.manual_seed(3)
    if what == "save":

        def save(step: int) -> None:
            fastpeft.save_training(model, optimizer, folder, scheduler=scheduler, extra={"step": step})
            print("saved", flush=True)

        train(model, optimizer, scheduler, 0, 10_000, save)
        return
    first, steps = map(int, numbers)
    if first:
        torch.manual_seed(99)  # another process has other random numbers
        extra = fastpeft.load_training(model, optimizer, folder, scheduler=scheduler)
        assert extra == {"step": first}, extra
    losses = train(model, optimizer, scheduler, first, steps)
    fastpeft.save_training(model, optimizer, folder, scheduler=scheduler, extra={"step": first + steps})
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
