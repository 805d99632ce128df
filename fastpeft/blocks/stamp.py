"""What a linear and its adapters look like at one moment, to tell whether anything has changed since.

A stamp names the module's modes, its active adapters, and every tensor they are made of with its version.
As a version, it does not see a write through ``.data`` (:mod:`fastpeft.layers.norm_cache` says more), and it
is compared within one forward of the linears' parent: two stamps of one linear take some microseconds.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpeft.in_place.adapters import global_hooks
from fastpeft.in_place.record import LAYER_ATTRIBUTE
from fastpeft.layers.linear import LinearMixin


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def stamp_of(layer: nn.Module) -> tuple[object, ...]:
    """Return the stamp of a linear, with or without adapters; equal stamps: nothing has changed."""
    own = layer.__dict__
    found: list[object] = [id(layer), global_hooks()]
    names: Any = ()
    if isinstance(layer, LinearMixin):
        names = layer.active_adapters
        found += (names, layer.adapters_enabled, layer.merged_adapters, layer.row_adapters)
        found += (id(layer.specs.get(name)) for name in names)
    elif (record := own.get(LAYER_ATTRIBUTE)) is not None:
        peft: Any = layer
        names = tuple(peft.active_adapters)
        found += (names, peft._disable_adapters, tuple(peft.merged_adapters), id(record.response))
        found += ((id(s), s if isinstance(s, float) else None) for s in map(peft.scaling.get, names))
    _add(layer, found)
    for held in own["_modules"].values():
        if held is None:
            continue
        for name in names:  # the entries of the active adapters; a base layer has none
            for entries in (held._parameters, held._modules, held._buffers):
                if (entry := entries.get(name)) is not None:
                    if isinstance(entry, Tensor):
                        found += (id(entry), version_of(entry), entry.requires_grad)
                    else:
                        _add(entry, found)
        if not isinstance(held, nn.ModuleDict | nn.ParameterDict):
            _add(held, found)
    return tuple(found)


def _add(module: nn.Module, found: list[object]) -> None:
    """Add a module's mode, its hooks' number, its own tensors, and a dropout's p."""
    own = module.__dict__
    found += (id(module), own["training"], len(own["_forward_hooks"]), own.get("p"))
    for entries in (own["_parameters"], own["_buffers"]):
        for tensor in entries.values():
            if tensor is not None:
                found += (id(tensor), version_of(tensor), tensor.requires_grad)
