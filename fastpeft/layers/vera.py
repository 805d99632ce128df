"""VeRA's share of a layer: two trained vectors over a pair of random matrices that all layers have in common.

    y = x W^T + bias + b * (d * (drop(x) A^T)) B^T                            arXiv 2310.11454

with A [r, in] and B [out, r] frozen, cut out of one pair that is as large as the largest layer. It is LoRA
with ``lora_B = b B d`` ([out, r], made anew at each call from the vectors), so it goes through the same ops,
blocks and merges; since A is frozen, no input is kept for it, and of ``lora_B`` its factors alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.layers.adapted import Adapter
from fastpeft.layers.adapter import AdapterMixin, adapter_dtype
from fastpeft.layers.kinds import shape_of
from fastpeft.ops import remade
from fastpeft.ops.eager import is_transformed

_VECTORS = ("vera_lambda_b", "vera_lambda_d")


class Projections(nn.Module):
    """The frozen pair, one object in all layers of an adapter, so that it moves and is stored once.

    The draws are PEFT's: uniform by Kaiming's rule, from a generator of their own on the CPU.

    Args:
        r: the rank.
        in_features: the most that a layer has.
        out_features: likewise.
        key: seeds the generator.
        is_saved: whether files hold the pair, or the key alone.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, r: int, in_features: int, out_features: int, *, key: int, is_saved: bool) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(key)
        self.key, self.is_saved = key, is_saved
        for name, shape in (("vera_A", (r, in_features)), ("vera_B", (out_features, r))):
            bound = math.sqrt(6.0 / shape[1])
            matrix = torch.empty(shape, dtype=torch.float32, device="cpu")
            # Not in state_dict: it would stand there once for each layer.
            self.register_buffer(name, matrix.uniform_(-bound, bound, generator=generator), persistent=False)


class _ScaledB(torch.autograd.Function):
    """``b B d`` [out, r], keeping references to its factors alone."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, B: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(b, B, d)
        return remade.scaled(b, B, d)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        b, B, d = ctx.saved_tensors
        product = gradient * B
        return product @ d, None, b @ product


def scaled_b(b: Tensor, B: Tensor, d: Tensor) -> Tensor:
    """Return ``diag(b) B diag(d)``, which ops keep for backward as its factors (:mod:`fastpeft.ops.remade`).

    Args:
        b: [out_features].
        B: [out_features, r], frozen.
        d: [r].
    """
    if is_transformed():
        return b[:, None] * B * d
    product: Tensor = _ScaledB.apply(b, B, d)  # type: ignore[no-untyped-call]
    if not torch.compiler.is_compiling():
        remade.mark(product, b, B, d)
    return product


@dataclass(frozen=True, kw_only=True)
class VeRASpec:
    """One module's share of a :class:`fastpeft.VeRA`."""

    r: int
    vera_dropout: float
    d_initial: float
    init_weights: bool
    projections: Projections = field(repr=False, compare=False)

    scaling = 1.0
    use_dora = False
    kinds = _VECTORS
    frozen = ()
    shared = ("vera_projections",)

    def create(self, layer: AdapterMixin, name: str) -> None:
        """``b = 0`` and ``d = d_initial``, so that a model starts as its base; random ones if so wished."""
        weight = layer.weight_out_in()
        dtype = adapter_dtype(weight)
        if "vera_lambda_b" not in layer._modules:
            for kind in _VECTORS:
                layer.add_module(kind, nn.ParameterDict())
            layer.add_module("vera_projections", nn.ModuleDict())
        b = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device)
        d = torch.full((self.r,), self.d_initial, dtype=dtype, device=weight.device)
        if not self.init_weights:
            b.fill_(1.0)
            d.normal_()
        modules: dict[str, Any] = layer._modules
        modules["vera_lambda_b"][name], modules["vera_lambda_d"][name] = nn.Parameter(b), nn.Parameter(d)
        modules["vera_projections"][name] = self.projections.to(weight.device, dtype)
        layer.add_dropout(name, self.vera_dropout)

    def adapter(self, layer: AdapterMixin, name: str) -> Adapter:
        """LoRA's matrices, of which ``lora_B`` is ``b B d``."""
        modules: dict[str, Any] = layer._modules
        pair: Projections = modules["vera_projections"][name]
        in_features, out_features = shape_of(layer)  # of a quantised one without making numbers of its weight
        b, d = modules["vera_lambda_b"][name], modules["vera_lambda_d"][name]
        return Adapter(
            name,
            pair.vera_A[:, :in_features].to(d.device),
            scaled_b(b, pair.vera_B[:out_features].to(d.device), d),
            None,
            1.0,
            layer.dropout_p(name),
            None,
        )

    def __str__(self) -> str:
        dropout = f", dropout={self.vera_dropout}" if self.vera_dropout else ""
        return f"VeRA(r={self.r}{dropout})"
