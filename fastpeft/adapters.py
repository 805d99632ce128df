"""Several adapters in one patched model: add, switch, disable, combine, delete, mix in one batch, merge.

For models patched by fastpeft itself; a PEFT model accelerated in place does all this by PEFT's own verbs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastpeft.blocks.install import fuse_blocks
from fastpeft.config import LoRA
from fastpeft.errors import ConfigError, PatchError
from fastpeft.in_place.install import is_peft
from fastpeft.layers.adapter import AdapterMixin, AdapterSpec
from fastpeft.methods.linears import LinearMethod, adapter_layers, build_layers, tied_to
from fastpeft.methods.lora import is_rewritten
from fastpeft.methods.registry import as_config, is_ours, method_of
from fastpeft.patching import restore_layer, set_submodule
from fastpeft.state import PatchState, find_state, require_state
from fastpeft.targets import listed, select

ModelT = TypeVar("ModelT", bound=nn.Module)
BASE = "__base__"  # PEFT's name for rows without an adapter


def add_adapter(
    model: ModelT, name: str, config: Any = None, *, allow_unmatched: bool | None = None
) -> ModelT:
    """Put another adapter on a patched model; :func:`set_adapter` makes it the active one.

    Args:
        model: patched by :func:`fastpeft.patch`.
        name: not in use yet.
        config: as for :func:`fastpeft.patch`; it may target other modules than the first adapter does. Biases
            and whole modules can only train with the adapter that the model was patched with.
        allow_unmatched: accept entries of ``target_modules`` that match nothing; default: for PEFT's objects.

    Raises:
        ConfigError: the configuration cannot work, or trains biases or whole modules.
        PatchError: the model is not patched, the name is taken, or a target matches nothing. The model is
            left as it was.
    """
    state = _state(model, "add_adapter")
    if name in state.configs:
        raise PatchError(f"add_adapter: the model already has an adapter {name!r}")
    if not name or "." in name or name == BASE:
        raise PatchError(f"add_adapter: expected a name without dots, got {name!r}")
    ours = as_config(config)
    method = method_of(ours)
    if not isinstance(method, LinearMethod):
        raise ConfigError(f"add_adapter: {type(ours).__name__} does not stand beside others; unpatch first")
    if ours.bias != "none" or ours.modules_to_save:
        raise ConfigError(
            f"add_adapter: bias={ours.bias!r} and modules_to_save={list(ours.modules_to_save)} can only "
            f"train with the first adapter, {state.owner!r}; expected 'none' and no modules"
        )
    if isinstance(ours, LoRA) and ours.rewrites_base:
        raise ConfigError(
            f"add_adapter: init_lora_weights={ours.init_lora_weights!r} rewrites the base, which "
            f"{state.owner!r} stands on; patch a plain model with it"
        )
    _refuse_merged(model, "add_adapter")
    _refuse_rewritten(model, "add_adapter")
    if allow_unmatched is None:
        allow_unmatched = config is not None and not is_ours(config)
    targets = select(model, ours, allow_unmatched=allow_unmatched).targets
    specs = method.specs(model, ours, targets)
    fresh = {path: module for path, module in targets.items() if not isinstance(module, AdapterMixin)}
    replacements = build_layers(fresh, specs, name)
    state.originals.update(fresh)
    for path, layer in replacements.items():
        set_submodule(model, path, layer)
    seen: set[int] = {id(layer) for layer in replacements.values()}
    for path, module in targets.items():
        if isinstance(module, AdapterMixin) and id(module) not in seen:
            seen.add(id(module))
            module.add_adapter(name, specs[path])
    state.configs[name] = ours
    _set_flags(model, active_adapters(model))
    fuse_blocks(model)
    method.attach(model, ours, name)
    return model


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the active adapters, in the order in which they are applied."""
    _state(model, "active_adapters")
    return next(layer.active_adapters for _, layer in adapter_layers(model))


def set_adapter(model: ModelT, names: str | Sequence[str]) -> ModelT:
    """Make one adapter, or several on top of one another, active and trainable, and all others neither.

    Raises:
        PatchError: the model is not patched, is merged, or has no adapter of a name.
    """
    state = _state(model, "set_adapter")
    chosen = (names,) if isinstance(names, str) else tuple(names)
    _known(state, chosen, "set_adapter")
    _refuse_merged(model, "set_adapter")
    for _, layer in adapter_layers(model):
        layer.active_adapters = chosen
    _set_flags(model, chosen)
    return model


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Forget one adapter; if it was the only active one, the first of those left becomes active.

    Raises:
        PatchError: the model is not patched, is merged, has no such adapter, or no other.
    """
    state = _state(model, "delete_adapter")
    _known(state, (name,), "delete_adapter")
    _refuse_merged(model, "delete_adapter")
    if len(state.configs) == 1:
        raise PatchError(f"delete_adapter: {name!r} is the model's only adapter; use fastpeft.unpatch(model)")
    if name == state.owner and (state.trained_values or state.saved_modules):
        raise PatchError(
            f"delete_adapter: {name!r} trains biases or whole modules; use fastpeft.unpatch(model)"
        )
    return remove_adapter(model, name)


def remove_adapter(model: ModelT, name: str) -> ModelT:
    """:func:`delete_adapter` without its questions."""
    state = _state(model, "remove_adapter")
    remaining = tuple(n for n in active_adapters(model) if n != name)
    del state.configs[name]
    if name == state.owner:
        state.owner = next(iter(state.configs))
    for path, layer in list(adapter_layers(model)):
        layer.delete_adapter(name)
        if not layer.specs:
            restore_layer(model, state, path)
    fuse_blocks(model)
    return set_adapter(model, remaining or next(iter(state.configs)))


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Compute the base model inside a ``with`` block.

    Raises:
        PatchError: the model is not patched, or merged, or the base is not there: a part of it was moved into
            the adapter, or it trains in place.
    """
    state = _state(model, "disable_adapters", by_name=False)
    _refuse_merged(model, "disable_adapters")
    _refuse_rewritten(model, "disable_adapters")
    config = state.configs[state.owner]
    layers = method_of(config).switches(model)
    if not layers:
        raise PatchError(
            f"disable_adapters: {type(config).__name__} trains the base in place, nothing beside it"
        )
    before = [layer.adapters_enabled for layer in layers]
    for layer in layers:
        layer.adapters_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapters_enabled = enabled


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give each row of the batch its own adapter inside a ``with`` block, ``"__base__"`` for none.

    All adapters are computed together, in two products a layer. For inference: dropout plays no part.

    Raises:
        PatchError: the model is not patched, is merged, or has no adapter of a name.
    """
    state = _state(model, "mixed_batch")
    _known(state, [name for name in names if name != BASE], "mixed_batch")
    _refuse_merged(model, "mixed_batch")
    _refuse_rewritten(model, "mixed_batch")
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        layer.row_adapters = tuple(names)
    try:
        yield
    finally:
        for layer in layers:
            layer.row_adapters = None


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
    state = _state(model, "combine_adapters")
    _known(state, list(weights), "combine_adapters")
    if method not in ("cat", "svd"):
        raise ConfigError(f"combine_adapters: expected method 'cat' or 'svd', got {method!r}")
    configs = {n: state.configs[n] for n in weights}
    if other := [n for n, c in configs.items() if not isinstance(c, LoRA) or c.use_dora]:
        kind = "DoRA" if isinstance(configs[other[0]], LoRA) else type(configs[other[0]]).__name__
        raise PatchError(f"combine_adapters: {listed(other)} is {kind}; expected LoRA adapters")
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
    _set_flags(model, active_adapters(model))
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


def merge(model: ModelT, names: str | Sequence[str] | None = None, *, keep_base: bool = True) -> ModelT:
    """Write adapters into the base weights; forward then costs what the base costs.

    Args:
        model: patched by :func:`fastpeft.patch`.
        names: which adapters, in this order; default: the active ones.
        keep_base: keep the base weights, in host memory, for :func:`unmerge` to give back to the bit.

    Raises:
        PatchError: the model is not patched or is merged, an adapter is unknown, a weight is quantised or
            tied to a module outside the adapter, or a merged weight is not finite. No weight is changed.
    """
    state = _state(model, "merge", by_name=not _merges_whole(model))
    if _merges_whole(model):
        if names is not None:
            raise PatchError(f"merge: the model's adapter has no name, expected None, got {names!r}")
        method_of(state.configs[state.owner]).merge(model, keep_base=keep_base)
        return model
    _refuse_merged(model, "merge")
    chosen = active_adapters(model) if names is None else (names,) if isinstance(names, str) else tuple(names)
    _known(state, chosen, "merge")
    layers = [(p, layer) for p, layer in adapter_layers(model) if any(n in layer.specs for n in chosen)]
    if quantised := [path for path, layer in layers if not layer.can_merge()]:
        raise PatchError(f"merge: the weight of {listed(quantised)} is quantised and cannot take an update")
    _refuse_tied(model, [path for path, _ in layers])
    done: list[AdapterMixin] = []
    for path, layer in layers:
        if not layer.merge(chosen, keep_base=True):
            for merged in done:
                merged.unmerge()
            raise PatchError(f"merge: the merged weight of {path} is not finite; nothing was merged")
        done.append(layer)
    if not keep_base:
        for layer in done:
            layer._unmerged = None
    return model


def unmerge(model: ModelT) -> ModelT:
    """Give the base weights back as they were before :func:`merge`, to the bit.

    Raises:
        PatchError: the model is not patched, not merged, or was merged with ``keep_base=False``.
    """
    state = _state(model, "unmerge", by_name=not _merges_whole(model))
    if _merges_whole(model):
        method_of(state.configs[state.owner]).unmerge(model)
        return model
    merged = [(path, layer) for path, layer in adapter_layers(model) if layer.merged_adapters]
    if not merged:
        raise PatchError("unmerge: nothing is merged")
    if gone := [path for path, layer in merged if layer._unmerged is None]:
        raise PatchError(f"unmerge: {listed(gone)} was merged with keep_base=False, its base weight is gone")
    for _, layer in merged:
        layer.unmerge()
    return model


def _merges_whole(model: nn.Module) -> bool:
    state = find_state(model) if isinstance(model, nn.Module) else None
    return state is not None and method_of(state.configs[state.owner]).merges_whole


def _state(model: nn.Module, verb: str, *, by_name: bool = True) -> PatchState:
    if isinstance(model, nn.Module) and is_peft(model):
        raise PatchError(
            f"{verb}: this {type(model).__name__} holds PEFT's own layers; use PEFT's own methods"
        )
    state = require_state(model, verb)
    config = state.configs[state.owner]
    if by_name and not (method := method_of(config)).has_names:
        raise PatchError(f"{verb}: {method.why_not(verb)}")
    return state


def _refuse_rewritten(model: nn.Module, verb: str) -> None:
    if is_rewritten(model):
        raise PatchError(
            f"{verb}: the initialisation moved a part of the base into the adapter, so the base alone is not "
            "there; fastpeft.save and load make a plain LoRA of it"
        )


def _known(state: PatchState, names: Sequence[str], verb: str) -> None:
    unknown = [name for name in names if name not in state.configs]
    if unknown or (not names and verb != "mixed_batch"):
        raise PatchError(
            f"{verb}: the model has no adapter {listed([repr(name) for name in unknown])}; it has "
            f"{listed([repr(name) for name in state.configs])}"
        )


def _refuse_merged(model: nn.Module, verb: str) -> None:
    if merged := next(
        (layer.merged_adapters for _, layer in adapter_layers(model) if layer.merged_adapters), None
    ):
        raise PatchError(f"{verb}: {listed(merged)} is merged; call fastpeft.unmerge(model) first")


def _refuse_tied(model: nn.Module, paths: Sequence[str]) -> None:
    for path, others in tied_to(model, paths):
        how = "too" if set(paths).issuperset(others) else "alone"
        raise PatchError(
            f"merge: the weight of {path} is tied to {listed(others)}, which would change {how}; "
            "untie them, or leave it out of target_modules"
        )


def _set_flags(model: nn.Module, active: Sequence[str]) -> None:
    """Gradients for the active adapters alone."""
    for _, layer in adapter_layers(model):
        layer.train_adapters(active)
