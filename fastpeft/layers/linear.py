"""``nn.Linear`` with an adapter."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft.layers.adapter import AdapterMixin


class LoRALinear(AdapterMixin, nn.Linear):  # type: ignore[misc]  # torch types bias as never None
    """Drop-in for the ``nn.Linear`` it was made from, whose weight and bias it shares."""

    def weight_out_in(self) -> Tensor:
        """Return the weight as it is stored."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self.adapted(input)

    def extra_repr(self) -> str:
        """Return nn.Linear's line and the adapter's."""
        return f"{nn.Linear.extra_repr(self)}, {self.adapter_repr()}"
