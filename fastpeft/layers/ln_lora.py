"""LoRA with a LayerNorm between its matrices, on a linear (:mod:`fastpeft.ops.ln_lora`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.layers.attached import AttachedAdapter
from fastpeft.ops.ln_lora import ln_lora

CHILD = "ln_lora"  # the adapter's name in the linear it is on


class LNLoRAAdapter(AttachedAdapter):
    """``output + scaling LN(drop(x) A^T) B^T`` with x the linear's input.

    B starts at zero, so that a model starts as its base; A Kaiming-uniform, the norm as the identity.

    Args:
        in_features: of the linear.
        out_features: likewise.
        r: the rank, at least 2: the norm of one feature is zero.
        scaling: the factor on what is added.
        lora_dropout: probability of zeroing an element of x during training.
        dtype: of the parameters.
        device: likewise.
    """

    child = CHILD

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        scaling: float,
        lora_dropout: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **kind))
        self.norm_weight = nn.Parameter(torch.ones(r, **kind))
        self.norm_bias = nn.Parameter(torch.zeros(r, **kind))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = scaling
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else None

    def forward(self, output: Tensor, given: Tensor | None = None) -> Tensor:
        """The linear's output [..., out_features] and input [..., in_features], with the adapter."""
        assert given is not None
        x = given if self.lora_dropout is None else self.lora_dropout(given)
        B: Tensor = self.lora_B if self.response is None else self.lora_B * self.response
        return ln_lora(output, x, self.lora_A, self.norm_weight, self.norm_bias, B, scaling=self.scaling)

    def extra_repr(self) -> str:
        """Return the rank and the scaling."""
        dropout = "" if self.lora_dropout is None else f", dropout={self.lora_dropout.p}"
        return f"LN-LoRA(r={self.lora_A.shape[0]}, scaling={self.scaling:g}{dropout})"
