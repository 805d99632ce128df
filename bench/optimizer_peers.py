"""Full fine-tuning by other optimisers, beside torch's AdamW: GaLore and LOMO, from their own packages.

None is timed before it passed its gate, in fp32 on a tiny model: LOMO gives what torch's SGD gives, to
rounding; GaLore gives what its formula gives, with the projection computed anew in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.clock import Stopwatch
from bench.contenders import LEARNING_RATE, Contender
from bench.measure import Phases
from bench.models import WORKLOADS
from fastpeft.planning import peers
from fastpeft.planning.peers import missing

__all__ = ["PEERS", "build", "missing"]

STEPS = 3
GATE_RATE = 0.1  # such that a step moves a weight by far more than its rounding
GATE_RANK = 8


class Fused(Contender):
    """A step whose updates are in its backward pass."""

    def step(self) -> Phases:
        """One training step; seconds by phase."""
        watch = Stopwatch(self.ids.device)
        loss = self.loss()
        watch.mark("forward")
        peers.backward(loss, self.optimizer)
        watch.mark("backward")
        watch.mark("optimizer")
        return watch.phases("step")


def _galore(base: nn.Module, ids: Tensor) -> Contender:
    """With the paper's 200 steps from projection to projection: the timed steps make none."""
    model = copy.deepcopy(base).requires_grad_(True)
    return Contender("galore", model, ids, optimizer=peers.galore(model, lr=LEARNING_RATE))


def _lomo(base: nn.Module, ids: Tensor) -> Contender:
    model = copy.deepcopy(base).requires_grad_(True)
    return Fused("lomo", model, ids, optimizer=peers.lomo(model, lr=LEARNING_RATE))


PEERS: dict[str, Callable[[nn.Module, Tensor], Contender]] = {"galore": _galore, "lomo": _lomo}


def build(name: str, base: nn.Module, ids: Tensor) -> Contender:
    """The contender `name`, after its gate.

    Raises:
        RuntimeError: it is not the method.
    """
    if reason := GATES[name]():
        raise RuntimeError(reason)
    return PEERS[name](base, ids)


def galore_difference() -> str | None:
    """What GaLore's step leaves different from the formula, or None."""
    theirs, ids = _tiny()
    ours = copy.deepcopy(theirs)
    optimizer = peers.galore(theirs, GATE_RANK, lr=GATE_RATE, gap=1)
    low = {id(p) for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    names = [n for n, p in theirs.named_parameters() if id(p) in low]
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(1, STEPS + 1):
        for model in (theirs, ours):
            torch.autograd.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                assert parameter.grad is not None
                rank = GATE_RANK if name in names else None
                galore_step(parameter, parameter.grad, moments, name, step, rank)
        ours.zero_grad()
    return _difference(theirs, ours, "its formula")


def galore_step(
    weight: Tensor,
    gradient: Tensor,
    moments: dict[str, tuple[Tensor, Tensor]],
    name: str,
    step: int,
    rank: int | None,
) -> None:
    """One step of the paper's algorithm 2 on one weight, `step` from 1; AdamW's where the rank is None.

    R = P^T G or G Q, N = Adam(R), W -= lr * scale * P N or N Q^T, with P and Q the singular vectors of G.
    """
    U, _, Vh = torch.linalg.svd(gradient, full_matrices=False) if rank else (gradient,) * 3
    is_tall = rank is not None and gradient.shape[0] >= gradient.shape[1]
    low = gradient if rank is None else gradient @ Vh[:rank].t() if is_tall else U[:, :rank].t() @ gradient
    m, v = moments.get(name, (torch.zeros_like(low), torch.zeros_like(low)))
    m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low * low
    moments[name] = m, v
    # The moments' corrections as the package has them: eps, 1e-6, is added before.
    scaled = m / (v.sqrt() + 1e-6)
    rate = GATE_RATE * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
    if rank is not None:
        scaled = peers.GALORE_SCALE * (scaled @ Vh[:rank] if is_tall else U[:, :rank] @ scaled)
    weight.sub_(rate * scaled)


def lomo_difference() -> str | None:
    """What LOMO's steps leave different from SGD's, or None."""
    theirs, ids = _tiny()
    ours = copy.deepcopy(theirs)
    optimizer = peers.lomo(theirs, lr=GATE_RATE)
    sgd = torch.optim.SGD(ours.parameters(), GATE_RATE)
    for _ in range(STEPS):
        peers.backward(theirs(input_ids=ids, labels=ids).loss, optimizer)
        torch.autograd.backward(ours(input_ids=ids, labels=ids).loss)
        sgd.step()
        sgd.zero_grad()
    return _difference(theirs, ours, "torch's SGD")


GATES: dict[str, Callable[[], str | None]] = {"galore": galore_difference, "lomo": lomo_difference}


def _tiny() -> tuple[Any, Tensor]:
    workload = WORKLOADS["tiny"]
    return workload.build(torch.float32), workload.batch_ids()


@torch.no_grad()
def _difference(theirs: nn.Module, ours: nn.Module, what: str) -> str | None:
    """The first parameter that is further from ours than rounding may take it, or None."""
    start = dict(_tiny()[0].named_parameters())
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        moved = torch.linalg.vector_norm(b - start[name])
        off = torch.linalg.vector_norm(a - b)
        # Each step rounds a weight once, and passes its gradient's rounding on.
        allowed = STEPS * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(b) + 1e-4 * moved
        if not (off <= allowed < moved):
            return f"{name} is off by {float(off):.1e} from {what}, {float(allowed):.1e} is allowed"
    return None
