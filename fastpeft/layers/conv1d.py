"""transformers' ``Conv1D`` (GPT-2's linear, with a transposed weight) with adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fastpeft.layers.adapter import AdapterMixin
from fastpeft.layers.linear import LinearMixin


class LoRAConv1D(LinearMixin, Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """Drop-in for the ``Conv1D`` it was made from, whose weight [in, out] and bias it shares."""

    def weight_out_in(self) -> Tensor:
        """Return the weight [in_features, out_features] as a transposed view."""
        return self.weight.t()

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return Conv1D's result."""
        result: Tensor = Conv1D.forward(self, x, *args, **kwargs)
        return result

    def extra_repr(self) -> str:
        """Return the sizes and the adapters."""
        return f"nf={self.nf}, nx={self.nx}, {self.adapter_repr()}"

    __repr__ = AdapterMixin.__repr__
