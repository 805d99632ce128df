"""Dropout's probability: a number, or in compiled code one that is read whenever that code runs.

``torch.compile`` makes a number that it finds on a module a constant, and compiles anew for every other one:
a schedule of p would compile the model again and again. What it finds as a tensor is an input. So a dropout
module carries a tensor that says which module it is (:class:`LiveProbability`), and an op inside the
compiled code asks that module for its p. Plain eager calls read ``dropout.p`` and see none of this.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastpeft.errors import ConfigError

ATTRIBUTE = "_fastpeft_probability"
_dropouts: weakref.WeakValueDictionary[int, nn.Dropout] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class LiveProbability:
    """The p that a dropout module has whenever it is asked for; copies and pickles belong to their module's.

    Attributes:
        dropout: the module.
        handle: its number in this process, int64 [] on the CPU. A tensor, as compiled code takes it for an
            input: a layer's number would be a constant of the code, which then fits no other layer.
    """

    def __init__(self, dropout: nn.Dropout) -> None:
        number = next(_numbers)
        _dropouts[number] = dropout
        self.dropout = dropout
        self.handle = torch.tensor(number, dtype=torch.int64, device="cpu")

    def __reduce__(self) -> tuple[type[LiveProbability], tuple[nn.Dropout]]:
        return LiveProbability, (self.dropout,)


Probability = float | LiveProbability


def follow(dropout: nn.Module) -> None:
    """Have compiled code read the module's p when it runs; for anything but an ``nn.Dropout``, nothing."""
    if type(dropout) is nn.Dropout and ATTRIBUTE not in dropout.__dict__:
        dropout.__dict__[ATTRIBUTE] = LiveProbability(dropout)


def unfollow(dropout: nn.Module) -> None:
    """Undo :func:`follow`."""
    dropout.__dict__.pop(ATTRIBUTE, None)


def probability_of(dropout: nn.Module) -> Probability | None:
    """Return what a dropout module drops now; None for one that is not ours to draw.

    Traced, a module that may drop is taken to drop, whatever its p is, 0 included.
    """
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout:
        return None
    if not dropout.training:
        return 0.0
    if torch.compiler.is_compiling() and hasattr(dropout, ATTRIBUTE):
        live: LiveProbability = getattr(dropout, ATTRIBUTE)
        return live
    return dropout.p if 0.0 <= dropout.p < 1.0 else None


def is_dropping(p: Probability) -> bool:
    """Whether anything may be dropped."""
    return isinstance(p, LiveProbability) or p > 0.0


def number(p: Probability) -> float:
    """Return p as it is now, outside compiled code."""
    return p.dropout.p if isinstance(p, LiveProbability) else p


def as_inputs(ps: Sequence[Probability]) -> tuple[list[float], Tensor | None]:
    """Return the probabilities as a custom op takes them: numbers, and fp64 [ps] in their place if live.

    All are live or none is.
    """
    live = [p.handle for p in ps if isinstance(p, LiveProbability)]
    if not live:
        return [p for p in ps if not isinstance(p, LiveProbability)], None
    assert len(live) == len(ps), "live probabilities beside numbers"
    return [0.0] * len(ps), torch.ops.fastpeft.probabilities(live)


def from_inputs(
    ps: Sequence[float], live: Tensor | None, seeds: Tensor | None
) -> tuple[list[float], Tensor | None]:
    """Return the probabilities of :func:`as_inputs` inside a custom op, and its seeds: None if all are 0."""
    if live is None:
        return list(ps), seeds
    now: list[float] = live.tolist()
    return now, seeds if any(now) else None


def _read(handles: list[Tensor]) -> Tensor:
    """Return the p of every handle's module, fp64 [handles] on the CPU."""
    ps = []
    for handle in handles:
        dropout = _dropouts.get(int(handle))
        if dropout is None:
            raise ConfigError("dropout in compiled code: the module is gone, compile the model again")
        if not 0.0 <= dropout.p < 1.0:
            raise ConfigError(f"dropout in compiled code: expected p from 0 to below 1, got p={dropout.p}")
        ps.append(dropout.p)
    return torch.tensor(ps, dtype=torch.float64, device="cpu")


_probabilities = torch.library.custom_op("fastpeft::probabilities", _read, mutates_args=())


@_probabilities.register_fake
def _(handles: list[Tensor]) -> Tensor:
    return torch.empty(len(handles), dtype=torch.float64, device="cpu")


def dropped(x: Tensor, p: Probability) -> Tensor:
    """drop(x), scaled by 1/(1-p), with autograd's own operations."""
    if not isinstance(p, LiveProbability):
        return nn.functional.dropout(x, p)
    now = torch.ops.fastpeft.probabilities([p.handle])[0].to(torch.float32)
    kept = torch.rand(x.shape, device=x.device) >= now
    scaled: Tensor = x * kept * (1.0 / (1.0 - now)).to(x.dtype)
    return scaled
