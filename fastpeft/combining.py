"""A new adapter from others: the weighted sum of their updates, exact or at a lower rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from fastpeft.adapters import active_adapters, known_names, set_flags, state_of
from fastpeft.config import LoRA
from fastpeft.errors import ConfigError, PatchError
from fastpeft.layers.adapter import AdapterMixin, AdapterSpec
from fastpeft.methods.linears import adapter_layers
from fastpeft.targets import listed

ModelT = TypeVar("ModelT", bound=nn.Module)


@torch.no_grad()
def combine_adapters(
    model: ModelT, weights: Mapping[str, float], name: str, *, method: Literal["cat", "svd"] = "cat"
) -> ModelT:
    """Add an adapter whose update is the weighted sum of others' updates.

    Args:
        model: patched by :func:`fastpeft.patch`.
        weights: a factor for each adapter.
        name: of the new adapter, not in use yet.
        method: ``"cat"``: exact, its rank is the sum of theirs; ``"svd"``: the best approximation at the
            largest of their ranks.

    Raises:
        PatchError: the model is not patched, an adapter is unknown, is DoRA (whose update is not a matrix
            that can be added), or they target different modules.
    """
    state = state_of(model, "combine_adapters")
    known_names(state, list(weights), "combine_adapters")
    if method not in ("cat", "svd"):
        raise ConfigError(f"combine_adapters: expected method 'cat' or 'svd', got {method!r}")
    configs = {n: state.configs[n] for n in weights}
    if other := [n for n, c in configs.items() if not isinstance(c, LoRA) or c.use_dora]:
        kind = "DoRA" if isinstance(configs[other[0]], LoRA) else type(configs[other[0]]).__name__
        raise PatchError(
            f"combine_adapters: {listed(other)} is {kind}; expected LoRA adapters. merge(model, "
            "{name: factor, ..}) writes a weighted sum of any adapters into the base weights"
        )
    layers = dict(adapter_layers(model))
    paths = {n: {path for path, layer in layers.items() if n in layer.specs} for n in weights}
    common = next(iter(paths.values()))
    if differing := [n for n in weights if paths[n] != common]:
        raise PatchError(f"combine_adapters: {listed(differing)} targets other modules than the first")
    if name in state.configs:
        raise PatchError(f"combine_adapters: the model already has an adapter {name!r}")
    first = state.configs[next(iter(weights))]
    ranks = {path: {n: layers[path].specs[n].r for n in weights} for path in common}
    rank = {path: sum(r.values()) if method == "cat" else max(r.values()) for path, r in ranks.items()}
    for path in common:
        layer = layers[path]
        A = torch.cat([layer.lora_A[n] for n in weights])
        B = torch.cat([layer.lora_B[n] * (w * layer.specs[n].scaling) for n, w in weights.items()], dim=1)
        if method == "svd":
            A, B = _truncated(A, B, rank[path])
        like = layer.specs[next(iter(weights))]
        assert isinstance(like, AdapterSpec)
        spec = dataclasses.replace(like, r=rank[path], scaling=1.0)
        _place(layer, name, spec, A, B)
    most = max(rank.values())
    state.configs[name] = dataclasses.replace(
        first,
        r=most,
        lora_alpha=most,
        use_rslora=False,
        bias="none",
        modules_to_save=(),
        rank_pattern={path: r for path, r in rank.items() if r != most},
        alpha_pattern={path: r for path, r in rank.items() if r != most},
    )
    set_flags(model, active_adapters(model))
    return model


def _place(layer: AdapterMixin, name: str, spec: AdapterSpec, A: Tensor, B: Tensor) -> None:
    layer.add_adapter(name, spec)
    layer.lora_A[name].copy_(A)
    layer.lora_B[name].copy_(B)


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best A, B of a rank for ``B A``, by an SVD of small matrices: B A = Q_B (R_B R_A^T) Q_A^T."""
    Q_A, R_A = torch.linalg.qr(A.t().double())
    Q_B, R_B = torch.linalg.qr(B.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.t())
    root = S[:rank].sqrt()
    left, right = Q_B @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ Q_A.t()
    missing = rank - left.shape[1]
    if missing > 0:  # a rank above the layer's own
        left, right = nn.functional.pad(left, (0, missing)), nn.functional.pad(right, (0, 0, 0, missing))
    return right.to(A.dtype), left.to(B.dtype)
