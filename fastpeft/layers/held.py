"""An adapter as compiled code reads it: by places whose names are the same whichever adapter is active.

``torch.compile`` makes the key of a dictionary a constant, so code that looks up ``lora_A["poems"]`` is
compiled anew when another adapter is switched to. What it finds as a tensor attribute of an object is an
input. So a layer keeps, beside its dictionaries, an object for each active adapter (:class:`Held`) with the
entries' places, and the compiled code reads those.

The dictionaries stay what everybody else reads and writes: state_dict, ``.to()``, FSDP2 and
``torch.func.functional_call`` exchange entries there, and a :class:`Watched` one passes that on. Eager calls
read the dictionaries themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.layers.adapted import Adapter
from fastpeft.ops.probability import Probability, probability_of


class Place:
    """What a :class:`Watched` dictionary has under one name now; None for nothing."""

    def __init__(self, held: Any) -> None:
        self.held = held


class Watched(dict[str, Any]):
    """A dictionary that keeps the places of its entries up to date.

    It stands for a module's ``_parameters`` or ``_modules``. A place outlives its entry: who takes one out
    and puts another in, as FSDP2 does, changes what it holds.
    """

    def place(self, name: str) -> Place:
        """Return the place of an entry, there or not."""
        places = self._places()
        if name not in places:
            places[name] = Place(self.get(name))
        return places[name]

    def _places(self) -> dict[str, Place]:
        # Unpickling sets the entries before there is an attribute.
        places: dict[str, Place] = self.__dict__.setdefault("places", {})
        return places

    def _follow(self) -> None:
        for name, place in self._places().items():
            place.held = self.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if (place := self._places().get(name)) is not None:
            place.held = value

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._follow()

    def pop(self, *args: Any) -> Any:
        """As a dictionary's."""
        value = super().pop(*args)
        self._follow()
        return value

    def popitem(self) -> tuple[str, Any]:
        """As a dictionary's."""
        item = super().popitem()
        self._follow()
        return item

    def clear(self) -> None:
        """As a dictionary's."""
        super().clear()
        self._follow()

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As a dictionary's."""
        super().update(*args, **kwargs)
        self._follow()

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As a dictionary's."""
        value = super().setdefault(name, default)
        self._follow()
        return value

    def __ior__(self, other: Any) -> Watched:  # type: ignore[override, misc]
        self.update(other)
        return self


def _registry(module: nn.Module) -> str:
    return "_parameters" if isinstance(module, nn.ParameterDict) else "_modules"


def watch(module: nn.ParameterDict | nn.ModuleDict) -> None:
    """Have a container's entries watched from now on."""
    registry = _registry(module)
    module.__dict__[registry] = Watched(module.__dict__[registry])


def entries_of(module: nn.Module) -> Watched | None:
    """Return a container's watched entries, None if another dictionary stands there."""
    entries = module.__dict__[_registry(module)]
    return entries if isinstance(entries, Watched) else None


class Held:
    """One active LoRA or DoRA adapter of a layer, to be read while its calls are compiled.

    Args:
        lora_A: the place of its A.
        lora_B: likewise.
        magnitude: likewise, None for LoRA.
        dropout: likewise.
        scaling: a number where all adapters of the layer have that one, else a tensor [] on the CPU: a number
            is a constant of the code.
        dropout_on_base: the meaning of DoRA's dropout.
    """

    def __init__(
        self,
        lora_A: Place,
        lora_B: Place,
        magnitude: Place | None,
        dropout: Place,
        scaling: float | Tensor,
        dropout_on_base: bool,
    ) -> None:
        self.lora_A, self.lora_B, self.magnitude, self.dropout = lora_A, lora_B, magnitude, dropout
        self.scaling, self.dropout_on_base = scaling, dropout_on_base

    def is_readable(self) -> bool:
        """Whether its tensors are still there, none parametrized, and its dropout is one that we know."""
        places = (self.lora_A, self.lora_B, *(() if self.magnitude is None else (self.magnitude,)))
        return all(place.held is not None for place in places) and self._dropout_p() is not None

    def adapter(self) -> Adapter:
        """Return it as forward takes it, without a name."""
        p, B, scaling = self._dropout_p(), self.lora_B.held, self.scaling
        assert p is not None, "not readable"
        if isinstance(scaling, Tensor):
            B, scaling = B * scaling, 1.0
        magnitude = None if self.magnitude is None else self.magnitude.held
        return Adapter("", self.lora_A.held, B, None, scaling, p, magnitude, self.dropout_on_base)

    def _dropout_p(self) -> Probability | None:
        dropout: nn.Module | None = self.dropout.held
        return 0.0 if dropout is None else probability_of(dropout)


# Of torch 2.7 on.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def is_compiled() -> bool:
    """Whether this call is being compiled, and not exported: an exported graph names its parameters."""
    return torch.compiler.is_dynamo_compiling() and not _is_exporting()
