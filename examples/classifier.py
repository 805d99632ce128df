"""An encoder with a linear head: features, the head that fits frozen features best, training, and its peak.

Every method starts from that head (linear probing, then fine-tuning: arXiv 2202.10054), so none has to find
it first, and none can be no better than it for want of steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fastpeft.ops.eager import seen_through
from fastpeft.planning.tracking import Tracker, quiet

Inputs = Mapping[str, Tensor]
Pool = Callable[[Tensor, Inputs], Tensor]

HEAD = "head"  # its name in the model, for modules_to_save
WARMUP = 0.1  # share of the steps in which the learning rate rises; a cosine after it
MAX_GRAD_NORM = 1.0
PROBE_ITERATIONS = 300
POOL = 8  # batches that are sorted by length together


class Classifier(nn.Module):
    """An encoder, one vector of features for each input, and a head on it.

    Args:
        encoder: called with the inputs, gives `last_hidden_state` [batch, tokens, hidden].
        pool: makes features [batch, features] of that and the inputs.
        features: how many.
        classes: how many.
    """

    def __init__(self, encoder: nn.Module, pool: Pool, features: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.head = nn.Linear(features, classes)
        self.config: Any = getattr(encoder, "config", None)

    def features(self, inputs: Inputs) -> Tensor:
        """What the head sees, [batch, features]."""
        return self.pool(self.encoder(**inputs).last_hidden_state, inputs)

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> SequenceClassifierOutput:
        """Logits [batch, classes] and, with labels [batch], the mean loss, as transformers' models give."""
        logits = self.head(self.features(inputs))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


Batch = Callable[[Tensor], tuple[Inputs, Tensor]]  # rows to inputs and labels


@torch.inference_mode()
def over(rows: int, size: int, batch: Batch, function: Callable[[Inputs], Tensor]) -> Tensor:
    """Return a function of all rows' inputs, `size` rows at a time."""
    parts = [function(batch(torch.arange(i, min(i + size, rows)))[0]) for i in range(0, rows, size)]
    return torch.cat(parts)


def fit_head(features: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Return weight [classes, features] and bias of the logistic regression of least loss.

    L-BFGS on standardised features, with `decay / 2` times the squared weights on them.
    """
    features = features.double()
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    standard = (features - mean) / deviation
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=PROBE_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(standard, weight, bias), labels) + decay / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        raw = weight / deviation
        return raw.float(), (bias - raw @ mean).float()


def best_head(
    train: tuple[Tensor, Tensor], apart: tuple[Tensor, Tensor], classes: int, decays: tuple[float, ...]
) -> tuple[Tensor, Tensor, float]:
    """Return weight, bias and decay of the head, fitted to `train`, whose decay did best on `apart`.

    Both are features and labels.
    """
    found = []
    for decay in decays:
        weight, bias = fit_head(*train, classes, decay)
        found.append((accuracy(F.linear(apart[0], weight, bias), apart[1]), weight, bias, decay))
    _, weight, bias, decay = max(found, key=lambda entry: entry[0])
    return weight, bias, decay


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean().item()


def groups(model: nn.Module, rate: float, head_rate: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: what trains at the method's rate, the head at its own."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in trained if name.startswith(f"{HEAD}.")]
    others = [p for name, p in trained if not name.startswith(f"{HEAD}.")]
    return [{"params": others, "lr": rate}, {"params": head, "lr": head_rate}]


def orders(rows: int, size: int, seed: int, lengths: Sequence[int] | None = None) -> Iterator[Tensor]:
    """Yield the rows of one batch after the other; every row once before any comes again.

    With lengths, rows of like length go together, so that little of a batch is padding: a pool of batches is
    drawn, sorted, and cut into batches, which come in a drawn order.
    """
    draw = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    pool = size if lengths is None else POOL * size
    while True:
        while len(order) < pool:
            order = torch.cat([order, torch.randperm(rows, generator=draw)])
        drawn, order = order[:pool], order[pool:]
        if lengths is not None:
            drawn = torch.tensor(sorted(drawn.tolist(), key=lambda row: lengths[row]))
        batches = torch.split(drawn, size)
        yield from (batches[i] for i in torch.randperm(len(batches), generator=draw).tolist())


class Training:
    """One method in training: warm-up and cosine over `steps` steps."""

    def __init__(
        self,
        model: Classifier,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        order: Iterator[Tensor],
        steps: int,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._batch, self._order = batch, order
        warmup = max(1, round(WARMUP * steps))

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        self.seconds = 0.0

    def step(self) -> float:
        """Take one step; return its loss."""
        inputs, labels = self._batch(next(self._order))
        began = time.perf_counter()
        self.model.train()
        loss = self.model(labels=labels, **inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.grad is not None], MAX_GRAD_NORM
        )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._schedule.step()
        self.seconds += time.perf_counter() - began
        return float(loss.item())

    def peak(self) -> int:
        """Take one more step; return the most bytes of tensors alive in it, weights and moments included.

        Counted exactly, whatever else the machine does; without what an allocator or a kernel adds.
        """
        held = [*self.model.parameters(), *self.model.buffers(), *tensors_of(self.optimizer)]
        with quiet(), seen_through(), Tracker(self.model) as tracker:
            tracker.hold(held, "weights")
            tracker.begin()
            self.step()
            return max(peak.bytes for peak in tracker.peaks().values())


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the tensors in an optimiser's state."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
