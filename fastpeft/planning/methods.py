"""What trains: everything, adapters, or blocks in turns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastpeft.config import LoRA
from fastpeft.errors import ConfigError
from fastpeft.in_place.install import is_peft
from fastpeft.methods.registry import as_config, is_ours
from fastpeft.patching import patch
from fastpeft.planning.names import NAMES, label, named
from fastpeft.sparse.ist import IST
from fastpeft.sparse.schedule import LISA, Schedule, StaticImportance, TopK
from fastpeft.state import find_state


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: for people.
        adapters: the configuration of those to put on; None: none. IST's are only for a model without.
        schedule: whose turn it is; None: all that train, always.
        everything: whether all parameters train; otherwise those that the model says, or the adapters.
    """

    label: str
    adapters: Any = None
    schedule: Schedule | None = None
    everything: bool = False

    def prepare(self, model: nn.Module) -> None:
        """Make a model ready to be trained so, in place."""
        if self.everything:
            model.requires_grad_(True)
        has_adapters = find_state(model) is not None or is_peft(model)
        if self.adapters is not None and not (has_adapters and isinstance(self.schedule, IST)):
            patch(model, self.adapters)


def parse(method: Any, rank: int | None = None, layers: int | None = None) -> Method:
    """Return the method that ``method`` stands for.

    Args:
        method: None (the model as it is: what requires gradients trains), a name of
            :data:`fastpeft.planning.names.NAMES`, perhaps with its number (``"lora:64"``, ``"lisa:2"``), what
            :func:`fastpeft.patch` takes (:class:`LoRA`, another method's configuration or PEFT's), a
            schedule, or (configuration, schedule).
        rank: of the adapters, instead of the method's own.
        layers: blocks that train at a time, instead of the schedule's own.

    Raises:
        ConfigError: there is no such method, or it has no rank or no number of layers.
    """
    if isinstance(method, Method):
        found = method
    elif method is None:
        found = Method("as it is")
    elif isinstance(method, str):
        meant = named(method)
        found = Method("full", everything=True) if meant is None else parse(meant)
    elif isinstance(method, Schedule):
        found = Method(_scheduled(method), LoRA() if isinstance(method, IST) else None, method)
    elif isinstance(method, (tuple, list)) and len(method) == 2 and isinstance(method[1], Schedule):
        found = Method(f"{label(as_config(method[0]))}, {_scheduled(method[1])}", *method)
    elif is_ours(method) or hasattr(method, "peft_type"):
        found = Method(label(as_config(method)), method)
    else:
        raise ConfigError(
            f"method: expected one of {', '.join(NAMES)}, a configuration for patch, a schedule, both in a "
            f"pair, or None, got {method!r}"
        )
    return _with_numbers(found, rank, layers)


def _with_numbers(method: Method, rank: int | None, layers: int | None) -> Method:
    adapters, schedule = method.adapters, method.schedule
    if rank is not None:
        if adapters is None or not hasattr(adapters := as_config(adapters), "r"):
            raise ConfigError(f"rank: {method.label} has no rank, expected None, got {rank!r}")
        adapters = dataclasses.replace(adapters, r=rank)
    if layers is not None:
        if not isinstance(schedule, (LISA, TopK, IST, StaticImportance)):
            raise ConfigError(
                f"layers: {method.label} does not choose how many train, expected None, got {layers!r}"
            )
        schedule = dataclasses.replace(schedule, layers=layers)
    if rank is None and layers is None:
        return method
    labels = [] if adapters is None else [label(as_config(adapters))]
    labels += [] if schedule is None else [_scheduled(schedule)]
    return Method(", ".join(labels), adapters, schedule, method.everything)


def _scheduled(schedule: Schedule) -> str:
    layers = getattr(schedule, "layers", None)
    return type(schedule).__name__ + ("" if layers is None else f" {layers} layers")
