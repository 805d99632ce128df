"""Mean weight norm of each layer over training (LISA, arXiv 2403.17919, section 3.1 and figure 2).

    w(l) = 1/T sum_{t=1..T} ||theta_t(l)||_2        after each of T optimiser steps

with theta(l) everything in layer l: a block, the embeddings, the head. Weights with adapters count as what
they amount to, from their factors; nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpeft.errors import ConfigError
from fastpeft.instruments.effective import adapted_weights
from fastpeft.layers.kinds import is_quantised
from fastpeft.layers.subclass import numbers_of
from fastpeft.ops._common import accumulation_dtype
from fastpeft.ops.row_norm import row_norm_squared
from fastpeft.targets import repeated_blocks

What = Literal["weights", "update"]


class WeightNorms:
    """Records the norms of a model's layers, step by step.

    >>> norms = WeightNorms(model)
    >>> norms.attach(optimizer)      # after every step from now on; or call record() where it suits
    >>> norms.mean()                 # {"model.embed_tokens": ..., "model.layers.0": ..., ...}

    Args:
        model: plain, patched by fastpeft, or PEFT's. Read, never changed.
        what: ``"weights"``: of all that a layer has. ``"update"``: of what adapters in linears and embeddings
            changed, ``W' - W``, which the paper's curve of LoRA can also be read as; layers without are 0.

    Attributes:
        history: by layer, a norm for each :meth:`record`.

    Raises:
        ConfigError: ``what`` is neither.
    """

    def __init__(self, model: nn.Module, *, what: What = "weights") -> None:
        if what not in get_args(What):
            raise ConfigError(f"what: expected one of {', '.join(get_args(What))}, got {what!r}")
        self._model = model
        self._what = what
        self._blocks = [path for path, _ in repeated_blocks(model)]
        self.history: dict[str, list[float]] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Record after each of the optimiser's steps; the handle's ``remove()`` ends it."""

        def after(*_: Any) -> None:
            self.record()

        return optimizer.register_step_post_hook(after)

    def record(self) -> dict[str, float]:
        """Measure, add the norms to :attr:`history`, and return them."""
        found = self.measure()
        for layer, norm in found.items():
            self.history.setdefault(layer, []).append(norm)
        return found

    def mean(self) -> dict[str, float]:
        """Return the mean of each layer's norms over what was recorded.

        Raises:
            ConfigError: nothing was recorded.
        """
        if not self.history:
            raise ConfigError("WeightNorms.mean: nothing was recorded; call record() after optimiser steps")
        return {layer: sum(norms) / len(norms) for layer, norms in self.history.items()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the norm of each layer now: blocks by path, and modules outside them by theirs.

        A weight that is tied counts where it comes first. What of a model has no parameters is left out.
        """
        adapted = dict(adapted_weights(self._model))
        seen = {id(p) for weight in adapted.values() for p in weight.own}
        sums: dict[str, list[Tensor]] = {}
        for path, module in self._model.named_modules():
            parts = sums.setdefault(self._layer(path), [])
            if (weight := adapted.get(path)) is not None:
                parts.append(weight.norm_squared() if self._what == "weights" else weight.update_squared())
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    squared = _squared(parameter, module)
                    parts.append(squared if self._what == "weights" else torch.zeros_like(squared))
        return _roots({layer: parts for layer, parts in sums.items() if parts})

    def _layer(self, path: str) -> str:
        """The block that a module is in, or the module itself; an adapter's module is its owner's."""
        for block in self._blocks:
            if path == block or path.startswith(f"{block}."):
                return block
        return path


def _squared(parameter: Tensor, module: nn.Module) -> Tensor:
    """The sum of a parameter's squares in fp64, on its device."""
    numbers = numbers_of(module) if is_quantised(parameter) else parameter
    if numbers.dim() == 2:
        return row_norm_squared(numbers).double().sum()
    norm: Tensor = torch.linalg.vector_norm(numbers, dtype=accumulation_dtype(numbers.dtype))
    return norm.double().square()


def _roots(sums: Mapping[str, list[Tensor]]) -> dict[str, float]:
    # One transfer from each device, not one for each layer.
    totals = torch.stack([torch.stack([part.cpu() for part in parts]).sum() for parts in sums.values()])
    return {layer: math.sqrt(total) for layer, total in zip(sums, totals.tolist(), strict=True)}
