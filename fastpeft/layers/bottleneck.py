"""A series or parallel adapter on any module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.layers.attached import AttachedAdapter
from fastpeft.ops.bottleneck import NonLinearity, bottleneck

CHILD = "bottleneck_adapter"  # the adapter's name in the module it is on


class BottleneckAdapter(AttachedAdapter):
    """``output + scaling (act(z D^T + d) U^T + u)`` with z the output (series) or the input (parallel).

    U, u and d start at zero, so that a model starts as its base; D Kaiming-uniform.

    Args:
        in_features: of z.
        out_features: of the output.
        size: the bottleneck's.
        non_linearity: between the projections.
        scaling: the factor on what is added.
        in_series: whether z is the output.
        dtype: of the parameters.
        device: likewise.
    """

    child = CHILD

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        non_linearity: NonLinearity,
        scaling: float,
        in_series: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.down = nn.Parameter(torch.empty(size, in_features, **kind))
        self.down_bias = nn.Parameter(torch.zeros(size, **kind))
        self.up = nn.Parameter(torch.zeros(out_features, size, **kind))
        self.up_bias = nn.Parameter(torch.zeros(out_features, **kind))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.non_linearity, self.scaling, self.in_series = non_linearity, scaling, in_series

    def forward(self, output: Tensor, given: Tensor | None = None) -> Tensor:
        """The module's output [..., out_features] (and input [..., in_features], for parallel) with it."""
        up: Tensor = self.up
        up_bias: Tensor = self.up_bias
        if self.response is not None:
            up, up_bias = up * self.response, up_bias * self.response
        return bottleneck(
            output,
            given,
            self.down,
            self.down_bias,
            up,
            up_bias,
            non_linearity=self.non_linearity,
            scaling=self.scaling,
        )

    def extra_repr(self) -> str:
        """Return the sizes and the kind."""
        size, in_features = self.down.shape
        kind = "series" if self.in_series else "parallel"
        scaling = "" if self.scaling == 1.0 else f", scaling={self.scaling:g}"
        return f"{kind}, {in_features} to {size} to {self.up.shape[0]}, {self.non_linearity}{scaling}"
