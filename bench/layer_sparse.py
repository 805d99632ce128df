"""Layer-sparse contenders: LISA, BAdam, top-K on a model's own blocks, IST on its adapters.

None is timed before its losses are, bit for bit, those of torch's AdamW on the blocks it trains first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import contenders
from bench.adapter import Adapter
from bench.contenders import LEARNING_RATE, Contender
from fastpeft import IST, LISA, BAdam, LayerSparseAdamW, TopK
from fastpeft.sparse.schedule import Part, Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the schedules are given."""

    layers: int
    """Blocks that train at a time."""
    period: int
    """Steps from switch to switch."""
    rank: int
    """Of the adapters that IST chooses from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A schedule, what trains besides, and what it chooses from."""

    schedule: Callable[[Settings], Schedule]
    always_on: Sequence[Part] | None = None
    adapters: bool = False


METHODS = {
    "lisa": Method(schedule=lambda s: LISA(s.layers, s.period)),
    "lisa, embeddings frozen": Method(
        schedule=lambda s: LISA(s.layers, s.period), always_on=("norms", "head")
    ),
    "badam": Method(schedule=lambda s: BAdam(s.period)),
    "topk": Method(schedule=lambda s: TopK(s.layers)),
    "ist": Method(schedule=lambda s: IST(s.layers, update_every=s.period), adapters=True),
}
HAND_FROZEN = "hand-frozen"
"""torch's AdamW on what LISA trains in its first interval, frozen by hand and never switched."""


def build(name: str, base: nn.Module, ids: Tensor, settings: Settings) -> tuple[Contender, Contender]:
    """The contender `name`, and torch's AdamW on the blocks it trains first.

    Raises:
        RuntimeError: their losses differ in one of two steps.
    """
    ours, model = (_sparse(name, base, ids, settings) for _ in range(2))
    _stop_schedule(model)
    trains = {n for n, p in ours.model.named_parameters() if p.requires_grad}
    for n, p in model.model.named_parameters():
        p.requires_grad_(n in trains)
    theirs = Contender(HAND_FROZEN, model.model, ids)
    losses = [[_one_step(contender) for _ in range(2)] for contender in (ours, theirs)]
    if losses[0] != losses[1]:
        raise RuntimeError(f"losses {losses[0]}, torch's AdamW on the same blocks {losses[1]}")
    return ours, theirs


def step_bytes(contender: Contender, settings: Settings) -> tuple[int, int]:
    """Peak and moments over so many steps that the blocks change among them, or one where they never do."""
    return contender.step_bytes(settings.period + 1 if _is_sparse(contender) else 1)


def _sparse(name: str, base: nn.Module, ids: Tensor, settings: Settings) -> Contender:
    method = METHODS[name]
    model = copy.deepcopy(base)
    if method.adapters:
        torch.manual_seed(1)
        contenders.fastpeft_model(model, Adapter(rank=settings.rank, dora=False))
    optimizer = LayerSparseAdamW(
        model, LEARNING_RATE, schedule=method.schedule(settings), always_on=method.always_on
    )
    return Contender(name, model, ids, optimizer=optimizer)


def _is_sparse(contender: Contender) -> bool:
    return isinstance(contender.optimizer, LayerSparseAdamW)


def _stop_schedule(contender: Contender) -> None:
    assert isinstance(contender.optimizer, LayerSparseAdamW)
    contender.optimizer.sparse.remove()


def _one_step(contender: Contender) -> float:
    loss = contender.loss()
    torch.autograd.backward(loss)
    assert contender.optimizer is not None
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    return loss.item()
