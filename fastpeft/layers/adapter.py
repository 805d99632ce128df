"""What every patched layer shares: adapter parameters by name, their initialisation, switching and merging.

A layer keeps the base's own ``weight`` and ``bias`` Parameters under their own names, so the base model's
state_dict keys, tied weights and code that reads ``layer.weight`` see no difference. Beside them it holds, by
adapter name, ``lora_A[name] [r, in_features]``, ``lora_B[name] [out_features, r]`` and, for DoRA,
``lora_magnitude_vector[name] [out_features]``, and ``lora_dropout[name]`` where it drops anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastpeft.errors import ConfigError
from fastpeft.layers.adapted import Adapter
from fastpeft.layers.merging import merged_weight
from fastpeft.layers.norm_cache import NormCache
from fastpeft.ops.probability import Probability, follow, probability_of
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
    """Adapters of a module; the sibling base class is the patched module's own.

    That sibling declares ``weight`` and ``bias``.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict
    # Of the adapters that drop anything; their p may change at any time, as PEFT's may.
    lora_dropout: nn.ModuleDict
    specs: dict[str, AdapterSpec]
    # Those whose names are here and in `specs` take part in forward, in this order.
    active_adapters: tuple[str, ...]
    adapters_enabled: bool
    merged_adapters: tuple[str, ...]
    # One name for every row of the next inputs, where rows go by different adapters.
    row_adapters: tuple[str, ...] | None
    # What the adapters' outputs are multiplied by for the moment (fastpeft.sparse.suppression).
    response: Tensor | None = None

    def weight_out_in(self) -> Tensor:
        """Return the base weight as [out_features, in_features], a view; dequantised where it is not one."""
        raise NotImplementedError

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the module computes without adapters."""
        raise NotImplementedError

    def can_merge(self) -> bool:
        """Whether the weight can take an update."""
        return True

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
        self.lora_dropout = nn.ModuleDict()
        self.specs = {}
        self.active_adapters = ()
        self.adapters_enabled = True
        self.merged_adapters = ()
        self.row_adapters = None
        self._unmerged: Tensor | None = None
        self._norm_caches: dict[str, NormCache] = {}

    @property
    def active_adapter(self) -> str:
        """The first of the active adapters."""
        return self.active_adapters[0]

    def add_adapter(self, name: str, spec: AdapterSpec) -> None:
        """Create and initialise the parameters of one adapter; it is not active yet.

        They are fp32 over a 16-bit or quantised base and in the base's dtype otherwise, on its device.
        """
        weight = self.weight_out_in()
        out_features, in_features = weight.shape
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        lora_A = torch.empty(spec.r, in_features, dtype=dtype, device=weight.device)
        lora_B = torch.zeros(out_features, spec.r, dtype=dtype, device=weight.device)
        self._initialise(lora_A, lora_B, spec)
        self.lora_A[name] = nn.Parameter(lora_A)
        self.lora_B[name] = nn.Parameter(lora_B)
        self.specs[name] = spec
        if spec.lora_dropout > 0.0:
            dropout = nn.Dropout(spec.lora_dropout).train(self.training)
            follow(dropout)
            # Not by its own setter, which refuses names like 'type' and 'train'.
            self.lora_dropout._modules[name] = dropout
        if spec.use_dora:
            with torch.no_grad():
                # The norm that forward computes, so that the row scale starts at exactly 1 where B is zero.
                norm = row_norm(weight, lora_A, lora_B, spec.scaling, row_norm_squared(weight))
            self.lora_magnitude_vector[name] = nn.Parameter(norm.to(dtype))
            self.norm_cache(name)  # there from the start: one that comes with the first call compiles it anew

    def _initialise(self, lora_A: Tensor, lora_B: Tensor, spec: AdapterSpec) -> None:
        if spec.init_lora_weights == "gaussian":
            nn.init.normal_(lora_A, std=1.0 / spec.r)
        else:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        if spec.init_lora_weights is False:
            nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))

    def delete_adapter(self, name: str) -> None:
        """Forget one adapter, if the layer has it."""
        for held in (self.lora_A, self.lora_B, self.lora_magnitude_vector, self.lora_dropout):
            if name in held:
                del held[name]
        self.specs.pop(name, None)
        self._norm_caches.pop(name, None)
        self.active_adapters = tuple(n for n in self.active_adapters if n != name)

    def adapters(self, names: Sequence[str] | None = None) -> list[Adapter]:
        """Return those adapters of these names (default: the active ones) that the layer has."""
        found = []
        # Module internals: ParameterDict's and nn.Module's own lookups take 2 us a name.
        A, B = self._modules["lora_A"]._parameters, self._modules["lora_B"]._parameters  # type: ignore[union-attr]
        for name in self.active_adapters if names is None else names:
            spec = self.specs.get(name)
            if spec is not None:
                found.append(
                    Adapter(
                        name,
                        A[name],  # type: ignore[arg-type]  # those of a spec are there
                        B[name],  # type: ignore[arg-type]
                        None,
                        spec.scaling,
                        self._dropout_p(name),
                        self.lora_magnitude_vector[name] if spec.use_dora else None,
                        spec.dropout_on_base,
                    )
                )
        return found

    def _dropout_p(self, name: str) -> Probability:
        dropout: nn.Module | None = self._modules["lora_dropout"]._modules.get(name)  # type: ignore[union-attr]
        if dropout is None:
            return 0.0
        if (p := probability_of(dropout)) is None:
            raise ConfigError(f"lora_dropout of {name!r}: expected nn.Dropout of 0 <= p < 1, got {dropout}")
        return p

    def norm_cache(self, name: str) -> NormCache:
        """Return the cache of an adapter's row norm."""
        cache = self._norm_caches.get(name)
        if cache is None:
            cache = self._norm_caches[name] = NormCache()
        return cache

    @torch.no_grad()
    def merge(self, names: Sequence[str], *, keep_base: bool) -> bool:
        """Write these adapters into the weight; False, and nothing done, where the result is not finite.

        The weight as it was goes to host memory if ``keep_base``: no subtraction gives it back to the bit.
        """
        weight = self.weight_out_in()
        merged = merged_weight(weight, self.adapters(names))
        if not torch.isfinite(merged).all():
            return False
        self._unmerged = self.weight.detach().to("cpu", copy=True) if keep_base else None
        weight.copy_(merged)
        self.merged_adapters = tuple(names)
        return True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Write the weight back that was there before :meth:`merge`."""
        assert self._unmerged is not None
        self.weight.copy_(self._unmerged)
        self._unmerged, self.merged_adapters = None, ()

    def adapter_repr(self) -> str:
        """Return what the layer's repr adds to the base's."""
        texts = []
        for name, spec in self.specs.items():
            method = "DoRA" if spec.use_dora else "LoRA"
            dropout = f", dropout={self.lora_dropout[name].p}" if name in self.lora_dropout else ""
            label = f"{name}: " if len(self.specs) > 1 else ""
            texts.append(f"{label}{method}(r={spec.r}, scaling={spec.scaling:g}{dropout})")
        return ", ".join(texts)
