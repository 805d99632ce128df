"""transformers' ``Conv1D`` (GPT-2's linear, with a transposed weight) with an adapter."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fastpeft.layers.adapter import AdapterMixin


class LoRAConv1D(AdapterMixin, Conv1D):  # type: ignore[misc]  # transformers is untyped here
    """Drop-in for the ``Conv1D`` it was made from, whose weight [in, out] and bias it shares."""

    def weight_out_in(self) -> Tensor:
        """Return the weight [in_features, out_features] as a transposed view."""
        return self.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        """[..., nx] to [..., nf]."""
        return self.adapted(x)

    def extra_repr(self) -> str:
        """Return the sizes and the adapter."""
        return f"nf={self.nf}, nx={self.nx}, {self.adapter_repr()}"

    __repr__ = AdapterMixin.__repr__
