"""A training step under the tracker: forward, backward, optimiser, as a user's loop runs them.

The same function serves a plan (a model without memory) and a measurement (a real one), so that neither can
drift from the other, nor from what training does: the model, the ops, the optimiser and the schedule are the
real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastpeft.planning.optimizers import state_tensors
from fastpeft.planning.peers import backward, is_fused
from fastpeft.planning.storages import Storage
from fastpeft.planning.tracking import Peak, Region, Tracker, quiet
from fastpeft.sparse.controller import LayerSparse

KINDS = ("weights", "gradients", "optimizer_state", "activations", "caches")
PHASES = ("forward", "backward", "optimizer")
Made = tuple[torch.optim.Optimizer, LayerSparse | None]


@dataclass
class Usage:
    """What one step held.

    Attributes:
        components: by kind, the bytes of each module: the weights; the gradients after the backward pass; the
            optimiser's state; the activations saved for backward, at the end of the forward pass; what
            layers keep from step to step (DoRA's norms).
        peaks: of each region of the step.
        without_gradient: names of parameters that require a gradient and got none.
        journal: every change of the bytes alive during the step, in order.
    """

    components: dict[str, Counter[str]] = field(default_factory=dict)
    peaks: dict[Region, Peak] = field(default_factory=dict)
    without_gradient: frozenset[str] = frozenset()
    journal: list[int] = field(default_factory=list)

    def total(self, kind: str) -> int:
        """Return the bytes of a kind in all modules."""
        return sum(self.components.get(kind, Counter()).values())


def train(
    model: nn.Module,
    ids: Tensor,
    make_optimizer: Callable[[nn.Module], Made],
    *,
    without_values: bool,
    warm_up: int = 0,
) -> Usage:
    """Train two steps and return what the second one held, by which time the optimiser has its state.

    Args:
        model: in training mode, with what trains chosen.
        ids: [batch, sequence], tokens and labels.
        make_optimizer: makes the optimiser of the model, and its schedule.
        without_values: the tensors have no data.
        warm_up: steps of the optimiser alone before, for blocks that have had their turn.
    """
    tracker = _tracker(model, without_values)
    tracker.hold([ids], "inputs")
    usage = Usage()
    with quiet(), tracker:
        optimizer, sparse = make_optimizer(model)
        _step_alone(model, optimizer, warm_up)
        for _ in range(2):
            usage = _one_step(model, ids, optimizer, sparse, tracker)
    return usage


def step_alone(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Made],
    without_gradient: Callable[[str], bool],
    *,
    warm_up: int = 0,
) -> Usage:
    """Run the optimiser's step alone, twice, on gradients without values; return what the second one held.

    Args:
        model: without memory, with what trains chosen.
        make_optimizer: as for :func:`train`.
        without_gradient: whether backward gives a parameter of this name no gradient.
        warm_up: as for :func:`train`.
    """
    tracker = _tracker(model, without_values=True)
    with quiet(), tracker:
        optimizer, sparse = make_optimizer(model)
        _step_alone(model, optimizer, warm_up, without_gradient)
        for _ in range(2):
            tracker.begin()
            _give_gradients(model, optimizer, without_gradient)
            usage = Usage({"gradients": _gradients(model, tracker)})
            tracker.enter("optimizer")
            _update(optimizer)
            _know_state(model, optimizer, sparse, tracker)
    for kind in ("weights", "optimizer_state"):
        usage.components[kind] = _by_module(tracker.living(kind))
    usage.peaks = tracker.peaks()
    return usage


def _tracker(model: nn.Module, without_values: bool) -> Tracker:
    tracker = Tracker(model, without_values=without_values)
    for path, module in model.named_modules():
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        # The first owner of a tied weight has it.
        tracker.hold([t for t in own if not tracker.knows(t)], "weights", path)
    return tracker


def _one_step(
    model: nn.Module,
    ids: Tensor,
    optimizer: torch.optim.Optimizer,
    sparse: LayerSparse | None,
    tracker: Tracker,
) -> Usage:
    tracker.begin()
    before = {id(storage) for storage in tracker.living("temporaries")}
    tracker.enter("forward")
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    saved = [storage for storage in tracker.living("temporaries") if id(storage) not in before]
    tracker.enter("backward")
    backward(loss, optimizer)
    del loss
    usage = Usage({"gradients": _gradients(model, tracker)})
    usage.without_gradient = frozenset(
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
    )
    tracker.enter("optimizer")
    _update(optimizer)
    _know_state(model, optimizer, sparse, tracker)
    # What outlives the step is kept for the next: not by autograd, so by the layers.
    for storage in tracker.living("temporaries"):
        if storage.phase in ("forward", "backward"):
            storage.kind = "caches"
    for storage in saved:
        if storage.kind == "temporaries":
            storage.kind = "activations"
    usage.components["activations"] = _by_module(s for s in saved if s.kind == "activations")
    for kind in ("weights", "optimizer_state", "caches", "inputs"):
        usage.components[kind] = _by_module(tracker.living(kind))
    usage.peaks = tracker.peaks()
    usage.journal = tracker.journal()
    return usage


def _step_alone(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    without_gradient: Callable[[str], bool] = lambda _: False,
) -> None:
    for _ in range(steps):
        _give_gradients(model, optimizer, without_gradient)
        _update(optimizer)


def _update(optimizer: torch.optim.Optimizer) -> None:
    if not is_fused(optimizer):
        optimizer.step()
    optimizer.zero_grad()


def _give_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, without_gradient: Callable[[str], bool]
) -> None:
    if is_fused(optimizer):
        return  # none outlives the backward pass
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not without_gradient(name):
            parameter.grad = torch.empty_like(parameter)


def _gradients(model: nn.Module, tracker: Tracker) -> Counter[str]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tracker.hold([parameter.grad], "gradients", name.rpartition(".")[0])
    return _by_module(tracker.living("gradients"))


def _know_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparse: LayerSparse | None, tracker: Tracker
) -> None:
    owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    for parameter, tensor in state_tensors(optimizer, sparse):
        tracker.hold([tensor], "optimizer_state", owners.get(id(parameter), ""))


def _by_module(storages: Iterable[Storage]) -> Counter[str]:
    found: Counter[str] = Counter()
    for storage in storages:
        found[storage.module] += storage.bytes
    return found
