"""Suppressed adapters: their outputs times a factor that is a tensor, so that no factor compiles anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastpeft.errors import LayerSparseError
from fastpeft.in_place.install import is_accelerated
from fastpeft.in_place.record import LAYER_ATTRIBUTE, Layer
from fastpeft.layers.adapter import AdapterMixin
from fastpeft.layers.attached import AttachedAdapter
from fastpeft.targets import repeated_blocks

Carrier = AdapterMixin | AttachedAdapter | Layer


class Responses:
    """The factor of each block's adapters' outputs."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._carriers: list[list[Carrier]] = []
        for block in blocks:
            inside = [_carrier(module) for module in model.get_submodule(block).modules()]
            self._carriers.append([carrier for carrier in inside if carrier is not None])
            if not self._carriers[-1]:
                raise LayerSparseError(
                    f"adapters can be suppressed, and {block} has none of ours; fastpeft.patch(model) first"
                )
        device = next(model.parameters()).device
        self._factors: list[Tensor] = [torch.ones((), device=device) for _ in blocks]

    @contextlib.contextmanager
    def applied(self) -> Iterator[Callable[[frozenset[int], float], None]]:
        """Inside, the factors count; yields what sets them, for the places of suppressed blocks."""

        def suppress(chosen: frozenset[int], factor: float) -> None:
            for place, value in enumerate(self._factors):
                value.fill_(factor if place in chosen else 1.0)

        try:
            for carriers, factor in zip(self._carriers, self._factors, strict=True):
                for carrier in carriers:
                    carrier.response = factor
            yield suppress
        finally:
            for carriers in self._carriers:
                for carrier in carriers:
                    carrier.response = None


def blocks_with_adapters(model: nn.Module) -> list[str]:
    """Return the paths of the repeated blocks that hold an adapter which can be suppressed, in order."""
    blocks = [path for path, _ in repeated_blocks(model)]
    return [b for b in blocks if any(_carrier(m) is not None for m in model.get_submodule(b).modules())]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and then as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _carrier(module: nn.Module) -> Carrier | None:
    """What carries a layer's factor."""
    if isinstance(module, (AdapterMixin, AttachedAdapter)):
        return module
    if is_accelerated(module):
        layer: Layer = module.__dict__[LAYER_ATTRIBUTE]
        return layer
    return None
