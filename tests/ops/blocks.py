"""Projections for the tests of the block ops: made, cast, listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fastpeft.ops.dropout import draw_seeds, dropout_mask
from fastpeft_kernels.projection import Projection
from tests.device import DEVICE
from tests.kernels.test_dropout import recover_mask

Kind = Literal["base", "lora", "dora"]
TRAINED = ("bias", "lora_A", "lora_B", "magnitude")


def projection(
    n: int,
    k: int,
    r: int,
    kind: Kind = "lora",
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
    scaling: float = 0.7,
) -> Projection:
    g = torch.Generator().manual_seed(n * 31 + k * 7 + r)
    weight = (torch.randn(n, k, generator=g) / k**0.5).to(DEVICE, dtype)
    made = Projection(weight=weight, scaling=scaling)
    if bias:
        made = replace(made, bias=torch.randn(n, generator=g).to(DEVICE, dtype))
    if kind == "base":
        return made
    lora_A = (torch.randn(r, k, generator=g) / k**0.5).to(DEVICE, adapter or dtype)
    lora_B = (0.5 * torch.randn(n, r, generator=g) / r**0.5).to(DEVICE, adapter or dtype)
    made = replace(made, lora_A=lora_A, lora_B=lora_B)
    if kind == "lora":
        return made
    magnitude = weight.float().norm(dim=1) * (0.5 + torch.rand(n, generator=g)).to(DEVICE)
    return replace(made, magnitude=magnitude.to(adapter or dtype))


def trained(projections: Sequence[Projection]) -> list[Tensor]:
    """All parameters but the weights, in order."""
    every = [getattr(p, name) for p in projections for name in TRAINED]
    return [t for t in every if t is not None]


def names(projections: Sequence[Projection]) -> list[str]:
    return [
        f"{name} of {i}"
        for i, p in enumerate(projections)
        for name in TRAINED
        if getattr(p, name) is not None
    ]


def leaves(projections: Sequence[Projection], dtype: torch.dtype | None = None) -> list[Projection]:
    """Copies whose parameters, the weights aside, train; in ``dtype`` where one is given."""

    def leaf(t: Tensor | None, train: bool) -> Tensor | None:
        if t is None:
            return None
        return (t if dtype is None else t.to(dtype)).detach().clone().requires_grad_(train)

    return [
        replace(p, weight=leaf(p.weight, False), **{name: leaf(getattr(p, name), True) for name in TRAINED})
        for p in projections
    ]


def dropout_masks(
    shapes: Sequence[tuple[int, ...]], ps: Sequence[float], seed: int, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """The masks that a block op draws for inputs of these shapes after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    seeds = draw_seeds(torch.empty(0, device=DEVICE), ps, backend)
    masks = []
    for shape, p, one in zip(shapes, ps, seeds.split(1), strict=True):
        tokens = torch.empty(shape, dtype=dtype, device=DEVICE).flatten(0, -2)
        if backend == "triton" and p > 0.0:
            mask = recover_mask(*tokens.shape, p, one) / (1 - p)
        else:
            mask = dropout_mask(tokens, p, one)
        masks.append(mask.to(dtype).view(shape))
    return masks
