"""What trains: everything, adapters, or blocks in turns."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastpeft.config import LoRA, as_lora
from fastpeft.errors import ConfigError
from fastpeft.in_place.install import is_peft
from fastpeft.patching import patch
from fastpeft.sparse.ist import IST
from fastpeft.sparse.schedule import LISA, BAdam, Schedule, StaticImportance, TopK
from fastpeft.state import find_state

NAMES = ("full", "lora", "dora", "lisa", "badam", "topk", "ist")


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: for people.
        lora: the adapters to put on; None: none. IST's are only for a model that has none.
        schedule: whose turn it is; None: all that train, always.
        everything: whether all parameters train; otherwise those that the model says, or the adapters.
    """

    label: str
    lora: LoRA | None = None
    schedule: Schedule | None = None
    everything: bool = False

    def prepare(self, model: nn.Module) -> None:
        """Make a model ready to be trained so, in place."""
        if self.everything:
            model.requires_grad_(True)
        has_adapters = find_state(model) is not None or is_peft(model)
        if self.lora is not None and not (has_adapters and isinstance(self.schedule, IST)):
            patch(model, self.lora)


def parse(method: Any, rank: int | None = None, layers: int | None = None) -> Method:
    """Return the method that ``method`` stands for.

    Args:
        method: None (the model as it is: what requires gradients trains), a name of :data:`NAMES`, perhaps
            with its rank or number of layers (``"lora:64"``, ``"lisa:2"``), a :class:`LoRA` or
            ``peft.LoraConfig``, a schedule, or (LoRA, schedule).
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
        found = _named(method)
    elif isinstance(method, Schedule):
        found = Method(_scheduled(method), LoRA() if isinstance(method, IST) else None, method)
    elif isinstance(method, (tuple, list)) and len(method) == 2 and isinstance(method[1], Schedule):
        lora = as_lora(method[0])
        found = Method(f"{_adapters(lora)}, {_scheduled(method[1])}", lora, method[1])
    elif isinstance(method, LoRA) or hasattr(method, "peft_type"):
        found = Method(_adapters(as_lora(method)), as_lora(method))
    else:
        raise ConfigError(
            f"method: expected one of {', '.join(NAMES)}, a LoRA, a schedule, (LoRA, schedule) or None, "
            f"got {method!r}"
        )
    return _with_numbers(found, rank, layers)


def _named(text: str) -> Method:
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", text.strip().lower())
    name, number = (match[1], match[2]) if match else ("", None)
    count = None if number is None else int(number)
    if name in ("lora", "dora"):
        return _with_numbers(parse(LoRA(use_dora=name == "dora")), count, None)
    if name in ("lisa", "topk", "ist"):
        schedule: Schedule = {"lisa": LISA, "topk": TopK, "ist": IST}[name]()
        return _with_numbers(parse(schedule), None, count)
    if name == "badam" and count is None:
        return parse(BAdam())
    if name == "full" and count is None:
        return Method("full", everything=True)
    raise ConfigError(
        f"method: expected one of {', '.join(NAMES)}, with a rank or a number of layers where it has one "
        f"(lora:64, lisa:2), got {text!r}"
    )


def _with_numbers(method: Method, rank: int | None, layers: int | None) -> Method:
    lora, schedule = method.lora, method.schedule
    if rank is not None:
        if lora is None:
            raise ConfigError(f"rank: {method.label} has no adapters, expected None, got {rank!r}")
        lora = dataclasses.replace(lora, r=rank)
    if layers is not None:
        if not isinstance(schedule, (LISA, TopK, IST, StaticImportance)):
            raise ConfigError(
                f"layers: {method.label} does not choose how many train, expected None, got {layers!r}"
            )
        schedule = dataclasses.replace(schedule, layers=layers)
    if (lora, schedule) == (method.lora, method.schedule):
        return method
    labels = [_adapters(lora)] if lora is not None and not isinstance(schedule, IST) else []
    labels += [_scheduled(schedule)] if schedule is not None else []
    if lora is not None and isinstance(schedule, IST):
        labels.append(f"r={lora.r}")
    return dataclasses.replace(method, label=", ".join(labels), lora=lora, schedule=schedule)


def _adapters(lora: LoRA) -> str:
    return f"{'DoRA' if lora.use_dora else 'LoRA'} r={lora.r}"


def _scheduled(schedule: Schedule) -> str:
    layers = getattr(schedule, "layers", None)
    return type(schedule).__name__ + ("" if layers is None else f" {layers} layers")
