"""``nn.Linear`` with adapters, and what all linears with adapters share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastpeft.layers.adapted import (
    Adapter,
    Base,
    added_linear,
    fused_linear,
    suppressed,
    with_response,
)
from fastpeft.layers.adapter import AdapterMixin
from fastpeft.layers.norm_cache import PLAIN_TYPES
from fastpeft.layers.rows import added_by_row


class LinearMixin(AdapterMixin):
    """Forward of a linear with adapters; the sibling base class is the patched module's own."""

    # Whether the product with the weight is a plain one, which ours can take the place of.
    has_plain_product = True
    # (siblings, own name) where it may be computed together with others of its parent (fastpeft.blocks).
    siblings: Any = None

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in_features] to [..., out_features]; a jagged x [rows, (tokens), in_features] likewise."""
        if x is None:
            x = self.input_of(kwargs)
        if x.is_nested and x.layout is torch.jagged:  # its rows one after the other
            jagged: Any = x
            y = self(x.values(), *args, **kwargs)
            return torch.nested.nested_tensor_from_jagged(y, jagged.offsets(), jagged.lengths())
        if not self.adapters_enabled or self.merged_adapters:
            return self.base_forward(x, *args, **kwargs)
        if self.row_adapters is not None:
            result = self.base_forward(x, *args, **kwargs)
            everyone = self.adapters(list(self.specs))
            return added_by_row(
                result, x, self.row_adapters, everyone, self._base(), kept_norm=self.kept_norm
            )
        if self.siblings is not None and self.response is None and not args and not kwargs:
            siblings, name = self.siblings
            together: Tensor | None = siblings.result(name, x)
            if together is not None:
                return together
        adapters = self.adapters()
        if not adapters:
            return self.base_forward(x, *args, **kwargs)
        if self.response is not None:
            smaller = with_response(adapters, self.response)
            if smaller is None:
                y = self._adapted(x, adapters, *args, **kwargs)
                return suppressed(self.base_forward(x, *args, **kwargs), y, self.response)
            adapters = smaller
        return self._adapted(x, adapters, *args, **kwargs)

    def _adapted(self, x: Tensor, adapters: list[Adapter], *args: Any, **kwargs: Any) -> Tensor:
        weight = self.weight
        if args or kwargs or not self._is_fusable(weight):
            return added_linear(x, adapters, self._base(*args, **kwargs))
        return fused_linear(x, weight, self.weight_out_in(), self.bias, adapters, self.norm_cache, self._base)

    def _is_fusable(self, weight: Tensor) -> bool:
        plain = type(weight) in PLAIN_TYPES or isinstance(weight, FakeTensor)
        trains = weight.requires_grad and torch.is_grad_enabled()  # autograd's own product is the best then
        return self.has_plain_product and plain and not trains

    def _base(self, *args: Any, **kwargs: Any) -> Base:
        def product(x: Tensor) -> Tensor:
            return self.base_forward(x, *args, **kwargs)

        return Base(
            product=product, bias=self.bias, weight=self.weight_out_in, is_ours=self.has_plain_product
        )


class LoRALinear(LinearMixin, nn.Linear):  # type: ignore[misc]  # torch types bias as never None
    """Drop-in for the ``nn.Linear`` it was made from, whose weight and bias it shares."""

    def weight_out_in(self) -> Tensor:
        """Return the weight as it is stored, or as numbers where a tensor subclass quantises it."""
        weight = self.weight
        return weight if self._is_number(weight) else weight.dequantize()

    def can_merge(self) -> bool:
        """Whether the weight can take an update: a quantised one would round it away."""
        return self._is_number(self.weight)

    @staticmethod
    def _is_number(weight: Tensor) -> bool:
        return type(weight) in PLAIN_TYPES or not type(weight).__module__.startswith("torchao.")

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return nn.Linear's result."""
        return nn.Linear.forward(self, x, *args, **kwargs)

    def extra_repr(self) -> str:
        """Return nn.Linear's line and the adapters'."""
        return f"{nn.Linear.extra_repr(self)}, {self.adapter_repr()}"
