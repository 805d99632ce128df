"""Several adapters in one patched model: add, switch, disable, delete, mix in one batch, merge.

For models patched by fastpeft itself; a PEFT model accelerated in place does all this by PEFT's own verbs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from fastpeft.blocks.install import fuse_blocks
from fastpeft.config import LoRA
from fastpeft.errors import ConfigError, PatchError
from fastpeft.fields import is_number
from fastpeft.in_place.install import is_peft
from fastpeft.layers.adapter import AdapterMixin
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
    state = state_of(model, "add_adapter")
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
    set_flags(model, active_adapters(model))
    fuse_blocks(model)
    method.attach(model, ours, name)
    return model


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the active adapters, in the order in which they are applied."""
    state_of(model, "active_adapters")
    return next(layer.active_adapters for _, layer in adapter_layers(model))


def set_adapter(model: ModelT, names: str | Sequence[str]) -> ModelT:
    """Make one adapter, or several on top of one another, active and trainable, and all others neither.

    Raises:
        PatchError: the model is not patched, is merged, or has no adapter of a name.
    """
    state = state_of(model, "set_adapter")
    chosen = (names,) if isinstance(names, str) else tuple(names)
    known_names(state, chosen, "set_adapter")
    _refuse_merged(model, "set_adapter")
    for _, layer in adapter_layers(model):
        layer.active_adapters = chosen
    set_flags(model, chosen)
    return model


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Forget one adapter; if it was the only active one, the first of those left becomes active.

    Raises:
        PatchError: the model is not patched, is merged, has no such adapter, or no other.
    """
    state = state_of(model, "delete_adapter")
    known_names(state, (name,), "delete_adapter")
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
    state = state_of(model, "remove_adapter")
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
    state = state_of(model, "disable_adapters", by_name=False)
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

    All adapters are computed together, in two products a layer. For inference: dropout plays no part. A block
    inside another one gives the outer one's rows back at its end.

    Raises:
        PatchError: the model is not patched, is merged, or has no adapter of a name.
    """
    state = state_of(model, "mixed_batch")
    known_names(state, [name for name in names if name != BASE], "mixed_batch")
    _refuse_merged(model, "mixed_batch")
    _refuse_rewritten(model, "mixed_batch")
    layers = [layer for _, layer in adapter_layers(model)]
    before = [layer.row_adapters for layer in layers]
    for layer in layers:
        layer.row_adapters = tuple(names)
    try:
        yield
    finally:
        for layer, rows in zip(layers, before, strict=True):
            layer.row_adapters = rows


def merge(
    model: ModelT,
    names: str | Sequence[str] | Mapping[str, float] | None = None,
    *,
    keep_base: bool = True,
) -> ModelT:
    """Write adapters into the base weights; forward then costs what the base costs.

    Several names: one adapter after the other, as they are computed when active together and as PEFT's
    ``merge_adapter`` merges them; a DoRA scales what is there, by a norm of the base alone. Names with
    factors: ``W + sum_i f_i (W'_i - W)``, where ``W'_i`` is what adapter i alone makes of W: ``W + s B A``
    for LoRA, ``m / ||W + s B A|| (W + s B A)`` for DoRA (arXiv 2402.09353). Their order plays no part, and
    one name with a factor of 1 is the adapter itself. (PEFT's ``add_weighted_adapter`` makes a new A and B; a
    sum of DoRA's weights has none of low rank.) Either way in fp32 (fp64), rounded once to the weight's
    dtype.

    Args:
        model: patched by :func:`fastpeft.patch`.
        names: which adapters, in this order, or a factor for each; default: the active ones.
        keep_base: keep the base weights, in host memory, for :func:`unmerge` to give back to the bit.

    Raises:
        ConfigError: a factor is no finite number.
        PatchError: the model is not patched or is merged, an adapter is unknown, a weight is quantised or
            tied to a module outside the adapter, or a merged weight is not finite. No weight is changed.
    """
    state = state_of(model, "merge", by_name=not _merges_whole(model))
    if _merges_whole(model):
        if names is not None:
            raise PatchError(f"merge: the model's adapter has no name, expected None, got {names!r}")
        method_of(state.configs[state.owner]).merge(model, keep_base=keep_base)
        return model
    _refuse_merged(model, "merge")
    chosen = active_adapters(model) if names is None else (names,) if isinstance(names, str) else tuple(names)
    known_names(state, chosen, "merge")
    factors = None
    if isinstance(names, Mapping):
        for name, factor in names.items():
            if not is_number(factor):
                raise ConfigError(f"merge: expected a finite number for {name!r}, got {factor!r}")
        factors = [float(factor) for factor in names.values()]
    layers = [(p, layer) for p, layer in adapter_layers(model) if any(n in layer.specs for n in chosen)]
    if quantised := [path for path, layer in layers if not layer.can_merge()]:
        raise PatchError(f"merge: the weight of {listed(quantised)} is quantised and cannot take an update")
    _refuse_tied(model, [path for path, _ in layers])
    done: list[AdapterMixin] = []
    for path, layer in layers:
        if not layer.merge(chosen, keep_base=True, factors=factors):
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
    state = state_of(model, "unmerge", by_name=not _merges_whole(model))
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


def state_of(model: nn.Module, verb: str, *, by_name: bool = True) -> PatchState:
    """Return a patched model's state.

    Raises:
        PatchError: the model is not patched, is PEFT's, or (``by_name``) its adapter has no name.
    """
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


def known_names(state: PatchState, names: Sequence[str], verb: str) -> None:
    """Refuse names that no adapter of the model has.

    Raises:
        PatchError: there is such a name, or none at all.
    """
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


def set_flags(model: nn.Module, active: Sequence[str]) -> None:
    """Gradients for the active adapters alone."""
    for _, layer in adapter_layers(model):
        layer.train_adapters(active)
