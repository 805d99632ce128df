"""Subclasses of ``nn.Linear`` and ``nn.Embedding`` with adapters: their own forward, our update on it.

Quantised linears (bitsandbytes), Falcon's, Gemma 3's scaled embedding: whatever the class computes stays its
own, for every one a drop-in class is made on first use.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from fastpeft.layers.adapter import AdapterMixin
from fastpeft.layers.embedding import EmbeddingMixin
from fastpeft.layers.kinds import is_quantised
from fastpeft.layers.linear import LinearMixin
from fastpeft.layers.packed_4bit import keep_unpacked


class _OwnForward(AdapterMixin):
    """The parts that are the same for every class."""

    kind: type[nn.Module]

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the class's own result."""
        result: Tensor = self.kind.forward(self, x, *args, **kwargs)
        return result

    def extra_repr(self) -> str:
        """Return the class's line and the adapters'."""
        return f"{self.kind.extra_repr(self)}, {self.adapter_repr()}"

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made, not imported
        # Not by __getstate__, which objects have from Python 3.11 on.
        state = super().__reduce_ex__(max(protocol, 2))[2]
        return _rebuild, (self.kind,), state


class _SubclassLinear(_OwnForward, LinearMixin):
    has_plain_product = False

    def weight_out_in(self) -> Tensor:
        """Return the weight as numbers."""
        return numbers_of(self)

    def can_merge(self) -> bool:
        """Whether the weight can take an update: a quantised one would round it away."""
        return not is_quantised(self.weight)


class _SubclassEmbedding(_OwnForward, EmbeddingMixin):
    pass


_MADE: dict[type[nn.Module], type[AdapterMixin]] = {}


def subclass_with_adapters(kind: type[nn.Module]) -> type[AdapterMixin]:
    """Return the drop-in class for a subclass of nn.Linear or nn.Embedding."""
    if kind not in _MADE:
        parts = _SubclassEmbedding if issubclass(kind, nn.Embedding) else _SubclassLinear
        _MADE[kind] = type(f"LoRA{kind.__name__}", (parts, kind), {"kind": kind, "__module__": __name__})
    return _MADE[kind]


def _rebuild(kind: type[nn.Module]) -> AdapterMixin:
    made = subclass_with_adapters(kind)
    return made.__new__(made)


def numbers_of(layer: Any) -> Tensor:
    """Return a linear's weight [out_features, in_features] as numbers; bitsandbytes' is packed."""
    keep_unpacked(layer)
    weight: Any = layer.weight
    if (state := getattr(weight, "quant_state", None)) is not None:  # stored in floats too, where so wished
        numbers = sys.modules["bitsandbytes.functional"].dequantize_4bit(weight.data, state)
    elif type(weight).__module__.startswith("torchao."):
        numbers = weight.dequantize()
    elif weight.is_floating_point() and weight.dim() == 2:
        numbers = weight
    else:
        scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        numbers = weight.data.float() * (scales.to(weight.device).float() / 127.0)[:, None]
    assert isinstance(numbers, Tensor)
    return numbers
