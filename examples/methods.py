"""The methods that are compared: how each makes its optimiser on a fresh model, and where its rates begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fastpeft


@dataclass(frozen=True)
class Method:
    """How a method makes its optimiser on a fresh model, and the learning rates it is tried with."""

    rates: tuple[float, ...]
    build: Callable[[Any, float, int], torch.optim.Optimizer]


def adapted(model: Any, seed: int, *, dora: bool = False) -> Any:
    """Rank-16 adapters on every linear of the blocks."""
    torch.manual_seed(seed)
    return fastpeft.patch(model, fastpeft.LoRA(r=16, lora_alpha=32, use_dora=dora))


def adamw(model: Any, rate: float) -> torch.optim.Optimizer:
    """torch's AdamW on what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)


def loraplus(model: Any, rate: float, seed: int) -> torch.optim.Optimizer:
    """LoRA+ with the paper's ratio of 16."""
    return torch.optim.AdamW(fastpeft.loraplus_groups(adapted(model, seed), rate), weight_decay=0.0)


def sparse(model: Any, rate: float, schedule: Any, **options: Any) -> torch.optim.Optimizer:
    """AdamW under a schedule."""
    return fastpeft.LayerSparseAdamW(model, rate, weight_decay=0.0, schedule=schedule, **options)


def quarter(model: Any) -> int:
    """IST's number of layers at a time."""
    return max(1, int(model.config.num_hidden_layers) // 4)


METHODS = {
    "full": Method((2e-5, 5e-5, 1e-4), lambda m, lr, seed: adamw(m, lr)),
    "lora": Method((1e-3, 2e-3, 4e-3), lambda m, lr, seed: adamw(adapted(m, seed), lr)),
    "dora": Method((1e-3, 2e-3, 4e-3), lambda m, lr, seed: adamw(adapted(m, seed, dora=True), lr)),
    "lora+": Method((2e-4, 5e-4, 1e-3), loraplus),
    "lisa": Method((5e-5, 1e-4, 2e-4), lambda m, lr, seed: sparse(m, lr, fastpeft.LISA(2, 5, seed))),
    "badam": Method((1e-4, 2e-4, 5e-4), lambda m, lr, seed: sparse(m, lr, fastpeft.BAdam(5, seed=seed))),
    "ist": Method(
        (2e-3, 4e-3, 8e-3),
        lambda m, lr, seed: sparse(
            adapted(m, seed), lr, fastpeft.IST(quarter(m), seed=seed, update_every=5, score_lr=100.0)
        ),
    ),
    # IST's adapters, as many at a time and kept in the same way, but drawn at random.
    "random": Method(
        (2e-3, 4e-3, 8e-3),
        lambda m, lr, seed: sparse(
            adapted(m, seed), lr, fastpeft.LISA(quarter(m), 1, seed), on_deactivate="keep"
        ),
    ),
}
