"""What a linear and its adapters look like at one moment, to tell whether anything has changed since.

A stamp names the module's modes, its active adapters, and every tensor they are made of with its version.
As a version, it does not see a write through ``.data`` (:mod:`fastpeft.layers.norm_cache` says more), and it
is compared within one forward of the linears' parent: two stamps of one linear take some microseconds.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpeft.in_place.record import LAYER_ATTRIBUTE
from fastpeft.layers.linear import LinearMixin

_CONTAINERS = (nn.ModuleDict, nn.ParameterDict)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written; 0 for inference tensors, which do not count."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def stamp_of(layer: nn.Module) -> tuple[object, ...]:
    """Return the stamp of a linear, with or without adapters; equal stamps: nothing has changed."""
    own = layer.__dict__
    found: list[object] = []
    names: Any = ()
    if isinstance(layer, LinearMixin):
        names = layer.active_adapters
        found += (names, own["adapters_enabled"], own["merged_adapters"], own["row_adapters"])
        for name in names:
            found.append(id(own["specs"].get(name)))
    elif (record := own.get(LAYER_ATTRIBUTE)) is not None:
        peft: Any = layer
        names = tuple(peft.active_adapters)
        found += (names, peft._disable_adapters, tuple(peft.merged_adapters), id(record.response))
        for name in names:
            scaling = own["scaling"].get(name)
            found.append(id(scaling) if isinstance(scaling, Tensor) else scaling)
    _add(layer, found)
    for held in own["_modules"].values():
        if isinstance(held, _CONTAINERS):
            _add_entries(held, names, found)
        elif held is not None:
            _add(held, found)
    return tuple(found)


def _add_entries(held: nn.Module, names: Any, found: list[object]) -> None:
    """Add those of the active adapters."""
    parameters, modules = held.__dict__["_parameters"], held.__dict__["_modules"]
    for name in names:
        if (parameter := parameters.get(name)) is not None:
            found += (id(parameter), version_of(parameter), parameter.requires_grad)
        elif (module := modules.get(name)) is not None:
            _add(module, found)
        elif modules:  # torch.nn.utils.parametrize keeps what a parameter is computed of in a child
            for module in held.modules():
                _add(module, found)


def _add(module: nn.Module, found: list[object]) -> None:
    """Add a module's mode, its hooks' number, its own tensors, and a dropout's p."""
    own = module.__dict__
    found += (id(module), own["training"], len(own["_forward_hooks"]), own.get("p"))
    for parameter in own["_parameters"].values():
        if parameter is not None:
            found += (id(parameter), version_of(parameter), parameter.requires_grad)
    for buffer in own["_buffers"].values():
        if buffer is not None:
            found += (id(buffer), version_of(buffer))
