"""What trains in a live model, and the bytes it holds: as the planner counts, of tensors that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.in_place.install import tuner_layers
from fastpeft.methods.linears import adapter_layers
from fastpeft.planning.optimizers import state_tensors
from fastpeft.planning.printing import LABELS, gib
from fastpeft.sparse.candidates import trainable
from fastpeft.sparse.controller import LayerSparse
from fastpeft.state import find_state
from fastpeft.targets import repeated_blocks

KINDS = ("weights", "adapters", "gradients", "optimizer_state")


@dataclass(frozen=True, kw_only=True)
class Account:
    """Parameters and bytes.

    Attributes:
        parameters: elements of all parameters, adapters included.
        trained: of those that may train; under a schedule also the ones that wait for their turn.
        active: of those that train now.
        weights: bytes of parameters and buffers, adapters included.
        adapters: bytes of what the patch (or PEFT, in its layers) added, frozen parts such as VeRA's matrices
            included.
        gradients: bytes of the gradients that are there: after backward, before ``zero_grad``.
        optimizer_state: bytes of moments, masters and step counts that are there, kept aside or not.
        layers: by block, or module outside the blocks, the bytes of each.
    """

    parameters: int
    trained: int
    active: int
    weights: int
    adapters: int
    gradients: int
    optimizer_state: int
    layers: dict[str, dict[str, int]]

    @property
    def share(self) -> float:
        """``trained / parameters``, the papers' "# params"."""
        return self.trained / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        labels = {**LABELS, "adapters": "of them adapters"}
        lines = [
            f"{self.trained:,} of {self.parameters:,} parameters may train ({self.share:.4%}), "
            f"{self.active:,} train now"
        ]
        lines += [f"  {labels[kind]:<18}{gib(getattr(self, kind)):>12}" for kind in KINDS]
        return "\n".join(lines)


def account(model: nn.Module, optimizer: torch.optim.Optimizer | LayerSparse | None = None) -> Account:
    """Return what of a model trains, and the bytes of what is there now.

    Args:
        model: plain, patched by any method, or PEFT's; read only.
        optimizer: any torch optimiser, or the :class:`fastpeft.LayerSparse` at work on one, which knows what
            is kept aside; default: none, and no state.
    """
    sparse = optimizer if isinstance(optimizer, LayerSparse) else getattr(optimizer, "sparse", None)
    torchs = optimizer.optimizer if isinstance(optimizer, LayerSparse) else optimizer
    owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    held: dict[str, Iterable[tuple[str, Tensor]]] = {
        "weights": _own(model),
        "adapters": _adapters(model),
        "gradients": ((owners[id(p)], p.grad) for p in model.parameters() if p.grad is not None),
        "optimizer_state": ()
        if torchs is None
        else ((owners.get(id(p), ""), t) for p, t in state_tensors(torchs, sparse)),
    }
    blocks = [path for path, _ in repeated_blocks(model)]
    by_layer: dict[str, Counter[str]] = {}
    totals: Counter[str] = Counter()
    for kind, tensors in held.items():
        seen: set[int] = set()
        for path, tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:  # a tied weight, and a view, is there once
                seen.add(storage._cdata)
                layer = next((b for b in blocks if path == b or path.startswith(f"{b}.")), path)
                by_layer.setdefault(layer, Counter())[kind] += storage.nbytes()
                totals[kind] += storage.nbytes()
    parameters = list(model.parameters())
    return Account(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for _, p in trainable(model)),
        active=sum(p.numel() for p in parameters if p.requires_grad),
        layers={layer: dict(found) for layer, found in by_layer.items()},
        **{kind: totals[kind] for kind in KINDS},
    )


def _own(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield path, tensor


def _adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a patch of ours, or PEFT, added beside the base's own Parameters and buffers."""
    if (state := find_state(model)) is not None:
        named = model.named_parameters(remove_duplicate=False)
        base = {id(p) for name, p in named if name in state.requires_grad}
        layers = tuple(f"{path}." for path, _ in adapter_layers(model))
        for path, module in model.named_modules():
            own = [p for p in module._parameters.values() if p is not None]
            added = [p for p in own if id(p) not in base]
            yield from ((path, p) for p in added)
            if path.startswith(layers) or (own and len(added) == len(own)):
                yield from ((path, b) for b in module._buffers.values() if b is not None)
        return
    for path, layer in tuner_layers(model):
        kinds: Any = layer
        for name in (*kinds.adapter_layer_names, *kinds.other_param_names):
            if isinstance(held := getattr(layer, name, None), nn.Module):
                yield from ((f"{path}.{name}", tensor) for _, tensor in _own(held))
