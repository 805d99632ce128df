"""AdaLoRA's share of a layer: an update in the form of an SVD, whose triplets can be masked one by one.

    y = x W^T + bias + s * (drop(x) (E * A)^T) B^T,    s = lora_alpha / (init_r + 1e-5)     arXiv 2303.10512

with A [r, in], E [r, 1] and B [out, r]. It is LoRA with ``lora_A = E * A`` ([r, in], made anew at each call),
so it goes through the same ops, blocks and merges; the gradients of A and E come from that of the product,
without another pass over x or dY. The scaling is PEFT's: it divides by the rank that the adapter began with,
however many triplets are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft import sharding
from fastpeft.layers.adapted import Adapter
from fastpeft.layers.adapter import AdapterMixin, adapter_dtype
from fastpeft.ops.orthogonality import orthogonality

Pattern = dict[str, tuple[bool, ...]]
KINDS = ("lora_A", "lora_E", "lora_B")
_START = 0.02  # the standard deviation of A and B at first


@dataclass
class Ranks:
    """Which triplets an adapter has left: one object for all its layers.

    Attributes:
        pattern: by module path, whether each of the triplets that the layer began with is kept; empty before
            the first allocation.
        scores: by parameter (``path.kind``), the smoothed sensitivity and its uncertainty, shaped as the
            parameter; empty before the first score, and again once the ranks are final.
        is_final: the layers hold no more than the triplets kept: they came from a file of pruned ranks.
    """

    pattern: Pattern = field(default_factory=dict)
    scores: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    is_final: bool = False


@dataclass(frozen=True, kw_only=True)
class AdaLoRASpec:
    """One module's share of a :class:`fastpeft.AdaLoRA`.

    Attributes:
        r: triplets that the layer holds.
        init_r: those that it began with, which the scaling divides by.
    """

    r: int
    init_r: int
    lora_alpha: float
    lora_dropout: float
    init_lora_weights: bool
    ranks: Ranks = field(repr=False, compare=False)

    use_dora = False
    kinds = KINDS
    shared = ()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Everything, where there is nothing: DDP waits for the gradients of what trains."""
        return () if self.r else KINDS

    @property
    def scaling(self) -> float:
        """The factor on ``B (E * A)``."""
        return self.lora_alpha / (self.init_r + 1e-5)

    def create(self, layer: AdapterMixin, name: str) -> None:
        """``E = 0`` and small normal A and B, so that a model starts as its base; all random if wished."""
        weight = layer.weight_out_in()
        if "lora_E" not in layer._modules:
            layer.add_module("lora_E", nn.ParameterDict())
        shapes = ((self.r, weight.shape[1]), (self.r, 1), (weight.shape[0], self.r))
        modules: dict[str, Any] = layer._modules
        for kind, shape in zip(KINDS, shapes, strict=True):
            values = torch.zeros(shape, dtype=adapter_dtype(weight), device=weight.device)
            if kind != "lora_E" or not self.init_lora_weights:
                values.normal_(std=_START if self.init_lora_weights else 1.0)
            modules[kind][name] = nn.Parameter(values, requires_grad=self.r > 0)
        layer.add_dropout(name, self.lora_dropout)

    def adapter(self, layer: AdapterMixin, name: str) -> Adapter:
        """LoRA's matrices, of which ``lora_A`` is ``E * A``."""
        return Adapter(
            name,
            layer.parameter_of("lora_A", name) * layer.parameter_of("lora_E", name),
            layer.parameter_of("lora_B", name),
            None,
            self.scaling,
            layer.dropout_p(name),
            None,
        )

    def __str__(self) -> str:
        rank = f"r={self.r}" if self.r == self.init_r else f"r={self.r} of {self.init_r}"
        dropout = f", dropout={self.lora_dropout}" if self.lora_dropout else ""
        return f"AdaLoRA({rank}, scaling={self.scaling:g}{dropout})"


def matrices_of(layer: AdapterMixin, name: str) -> tuple[Tensor, Tensor]:
    """Return A and B^T [r, features], whose rows are to be orthonormal; whole, where FSDP2 shards them."""
    A, B = (sharding.gathered(layer.parameter_of(kind, name)) for kind in ("lora_A", "lora_B"))
    return A, B.t()


class OrthogonalLoss:
    """A forward hook that adds the regulariser to the loss which a model in training returns.

    Args:
        layers: those that have the adapter.
        name: the adapter's.
        weight: of the regulariser in the loss.
    """

    def __init__(self, layers: Sequence[AdapterMixin], name: str, weight: float) -> None:
        self.layers = tuple(layers)
        self.name = name
        self.weight = weight
        self._handle: Any = None

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        """Change ``output.loss``, where there is one and it is to be differentiated."""
        if self.weight == 0.0 or not model.training or not torch.is_grad_enabled():
            return
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and (matrices := self.matrices()):
            output.loss = loss + self.weight * orthogonality(matrices).to(loss.device)

    def matrices(self) -> list[Tensor]:
        """Return A and B^T of every layer that computes with the adapter now."""
        found: list[Tensor] = []
        for layer in self.layers:
            is_active = self.name in layer.specs and self.name in layer.active_adapters
            if is_active and layer.adapters_enabled and not layer.merged_adapters:
                found += matrices_of(layer, self.name)
        return found

    def put_on(self, model: nn.Module) -> None:
        """Work on a model, in the place of an earlier one for the same adapter."""
        for hook in hooks_of(model):
            if hook.name == self.name:
                hook.take_off()
        self._handle = model.register_forward_hook(self)

    def take_off(self) -> None:
        """Leave the model alone."""
        self._handle.remove()


def hooks_of(model: nn.Module) -> list[OrthogonalLoss]:
    """Return the model's regularisers."""
    return [hook for hook in model._forward_hooks.values() if isinstance(hook, OrthogonalLoss)]
