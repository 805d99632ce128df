"""What every patched linear layer shares: adapter parameters, their initialisation, the fused forward.

A layer keeps the base's own ``weight`` and ``bias`` Parameters under their own names, so the base model's
state_dict keys, tied weights and code that reads ``layer.weight`` see no difference. Beside them it holds, by
adapter name, ``lora_A[name] [r, in_features]``, ``lora_B[name] [out_features, r]`` and, for DoRA,
``lora_magnitude_vector[name] [out_features]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastpeft.layers.norm_cache import NormCache
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.row_norm import row_norm, row_norm_squared


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """One module's share of a :class:`fastpeft.LoRA`: rank and scaling resolved for its path."""

    r: int
    scaling: float
    lora_dropout: float
    use_dora: bool
    dropout_on_base: bool
    init_lora_weights: bool | Literal["gaussian"]


class AdapterMixin(nn.Module):
    """Adapter state and forward for a linear module; the sibling base class is the patched module's own.

    That sibling declares ``weight`` and ``bias``.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict
    active_adapter: str
    specs: dict[str, AdapterSpec]

    def weight_out_in(self) -> Tensor:
        """Return the base weight as [out_features, in_features], a view."""
        raise NotImplementedError

    def adopt(self, base: nn.Module) -> None:
        """Take over the base module's whole state: the same Parameters, buffers, hooks and attributes."""
        self.__dict__.update(base.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            # Copies, so that the adapter's entries do not reach the base module; hooks stay shared, so that
            # a handle taken before the patch still removes its hook.
            self.__dict__[registry] = base.__dict__[registry].copy()
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.specs = {}
        self._norm_cache = NormCache()

    def add_adapter(self, name: str, spec: AdapterSpec) -> None:
        """Create and initialise the parameters of one adapter and make it the active one.

        They are fp32 over a 16-bit base and in the base's dtype otherwise, on the base weight's device.
        """
        weight = self.weight_out_in()
        out_features, in_features = weight.shape
        dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        lora_A = torch.empty(spec.r, in_features, dtype=dtype, device=weight.device)
        lora_B = torch.zeros(out_features, spec.r, dtype=dtype, device=weight.device)
        if spec.init_lora_weights == "gaussian":
            nn.init.normal_(lora_A, std=1.0 / spec.r)
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        if spec.init_lora_weights is False:
            nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(lora_A)
        self.lora_B[name] = nn.Parameter(lora_B)
        self.specs[name] = spec
        self.active_adapter = name
        if spec.use_dora:
            with torch.no_grad():
                # The norm that forward computes, so that the row scale starts at exactly 1 where B is zero.
                norm = row_norm(weight, lora_A, lora_B, spec.scaling, row_norm_squared(weight))
            self.lora_magnitude_vector[name] = nn.Parameter(norm.to(dtype))

    def adapted(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]: what the layer's forward computes."""
        name = self.active_adapter
        spec = self.specs[name]
        dropout_p = spec.lora_dropout if self.training else 0.0
        weight, lora_A, lora_B = self.weight_out_in(), self.lora_A[name], self.lora_B[name]
        if not spec.use_dora:
            return lora_linear(
                x, weight, self.bias, lora_A, lora_B, scaling=spec.scaling, dropout_p=dropout_p
            )
        return dora_linear(
            x,
            weight,
            self.bias,
            lora_A,
            lora_B,
            self.lora_magnitude_vector[name],
            scaling=spec.scaling,
            dropout_p=dropout_p,
            dropout_on_base=spec.dropout_on_base,
            norm=self._norm_cache.norm(self.weight, weight, lora_A, lora_B, spec.scaling),
        )

    def adapter_repr(self) -> str:
        """Return what the layer's repr adds to the base's."""
        spec = self.specs[self.active_adapter]
        method = "DoRA" if spec.use_dora else "LoRA"
        dropout = f", dropout={spec.lora_dropout}" if spec.lora_dropout else ""
        return f"{method}(r={spec.r}, scaling={spec.scaling:g}{dropout})"
