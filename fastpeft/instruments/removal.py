"""Which blocks' adapters matter: take them away and watch the loss (IST, arXiv 2410.11772, figure 2).

Greedy: of the blocks that still have adapters, always the one without which the loss is least. A block's
adapters are suppressed (their outputs times 0), not unpatched, so that no weight moves and the model is
afterwards what it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import LayerSparseError
from fastpeft.sparse.suppression import Responses, blocks_with_adapters, evaluating

Loss = Callable[[nn.Module, Any], Tensor | float]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Removal:
    """An order of removal and its curve.

    Attributes:
        order: blocks in the order in which their adapters were taken away.
        losses: the loss with all adapters, then after each removal: one more than blocks.
    """

    order: tuple[str, ...]
    losses: tuple[float, ...]


def greedy_removal(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    count: int | None = None,
    progress: Progress | None = None,
) -> Removal:
    """Take the adapters of ``count`` blocks away, each time the ones that are missed least.

    For L blocks, ``1 + L (L + 1) / 2`` evaluations where all go.

    Args:
        model: patched by fastpeft, or PEFT's accelerated in place: adapters in linears and embeddings, series
            and parallel ones. It is left as it was, also where ``loss`` raises.
        loss: of the model on one batch; called in evaluation mode, without gradients.
        batches: the mean over these is the loss.
        count: of removals; default: all blocks that have adapters.
        progress: called after each evaluation with how many are done, and of how many.

    Raises:
        LayerSparseError: no block has an adapter, there is no batch, or a loss is not finite.
    """
    blocks, count = _checked(model, batches, count)
    total = 1 + sum(len(blocks) - i for i in range(count))

    def choose(left: list[int], loss_without: Callable[[int], float]) -> tuple[int, float]:
        losses = {place: loss_without(place) for place in left}
        best = min(left, key=lambda place: losses[place])  # of equal ones the lowest
        return best, losses[best]

    return _remove(model, loss, batches, blocks, count, choose, _Counted(progress, total))


def random_removal(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    *,
    count: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Removal:
    """Take the adapters of ``count`` blocks away in a random order: what a greedy curve is held against.

    Args and errors are those of :func:`greedy_removal`; the order follows from ``seed`` alone.
    """
    blocks, count = _checked(model, batches, count)
    order = random.Random(seed).sample(range(len(blocks)), count)
    turn = iter(order)

    def choose(left: list[int], loss_without: Callable[[int], float]) -> tuple[int, float]:
        place = next(turn)
        return place, loss_without(place)

    return _remove(model, loss, batches, blocks, count, choose, _Counted(progress, 1 + count))


@dataclass
class _Counted:
    """Evaluations, told to whoever wants to know."""

    progress: Progress | None
    total: int
    done: int = 0

    def one_more(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _checked(model: nn.Module, batches: Sequence[Any], count: int | None) -> tuple[list[str], int]:
    blocks = blocks_with_adapters(model)
    if not blocks:
        raise LayerSparseError(
            f"no block of this {type(model).__name__} has an adapter that can be taken away; "
            "fastpeft.patch(model) first"
        )
    if len(batches) == 0:
        raise LayerSparseError("batches: expected at least one, got none")
    most = len(blocks)
    if count is not None and not (isinstance(count, int) and 1 <= count <= most):
        raise LayerSparseError(f"count: expected a whole number from 1 to {most}, got {count!r}")
    return blocks, most if count is None else count


@torch.no_grad()
def _remove(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    blocks: list[str],
    count: int,
    choose: Callable[[list[int], Callable[[int], float]], tuple[int, float]],
    counted: _Counted,
) -> Removal:
    gone: list[int] = []
    with evaluating(model), Responses(model, blocks).applied() as suppress:

        def loss_of(places: Sequence[int]) -> float:
            suppress(frozenset(places), 0.0)
            found = sum(float(loss(model, batch)) for batch in batches) / len(batches)
            if not abs(found) < float("inf"):
                names = ", ".join(blocks[place] for place in places) or "none"
                raise LayerSparseError(f"the loss without the adapters of {names} is {found}")
            counted.one_more()
            return found

        losses = [loss_of(())]
        for _ in range(count):
            left = [place for place in range(len(blocks)) if place not in gone]
            place, found = choose(left, lambda place: loss_of((*gone, place)))
            gone.append(place)
            losses.append(found)
    return Removal(tuple(blocks[place] for place in gone), tuple(losses))
