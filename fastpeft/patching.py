"""Put adapters on a model in place, and take them off again.

``patch`` first plans (everything that can fail fails here, with the model untouched: new modules are built
beside it), then swaps them in. What is a method's own is in :mod:`fastpeft.methods`.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fastpeft import backend as backends
from fastpeft.blocks.install import described, fuse_blocks, release_blocks
from fastpeft.choice import choices
from fastpeft.errors import BackendError, PatchError
from fastpeft.in_place import install
from fastpeft.layers.adapter import AdapterMixin
from fastpeft.layers.kinds import is_quantised
from fastpeft.layers.packed_4bit import keep_unpacked
from fastpeft.methods.linears import adapter_layers
from fastpeft.methods.method import Plan
from fastpeft.methods.registry import as_config, is_ours, method_of
from fastpeft.patch_report import ModuleReport, PatchReport
from fastpeft.state import PatchState, find_state, require_state, store_state
from fastpeft.targets import listed, trains_whole

logger = logging.getLogger("fastpeft")
ModelT = TypeVar("ModelT", bound=nn.Module)


def patch(model: ModelT, config: Any = None, *, adapter_name: str = "default") -> ModelT:
    """Put adapters on the model, in place, and freeze everything else.

    A model that already holds PEFT's LoRA layers (a ``PeftModel``, ``inject_adapter_in_model``'s or
    transformers' ``add_adapter``'s) is accelerated in place instead: its modules, Parameters, state_dict keys
    and everything PEFT can do to it stay as they are, and adapters that PEFT adds later are accelerated too.

    Args:
        model: any ``nn.Module``, usually a transformers model. Its linears keep their weights (the same
            Parameter objects, tied ones stay tied); their modules are replaced by drop-in ones.
        config: a :class:`fastpeft.LoRA` or another method's configuration, PEFT's counterpart of one
            (``peft.LoraConfig``), or None for LoRA with r=16 on every linear inside the repeated blocks. None
            for a model with PEFT's layers.
        adapter_name: the adapter's name in the model's state_dict; files do not hold it.

    Returns:
        The same model. :func:`fastpeft.report` tells what was done to each module. Patching it again with an
        equal configuration changes nothing.

    Raises:
        ConfigError: the configuration cannot work.
        PatchError: a target matches nothing, a named module cannot be patched, or the model already carries
            other adapters. The model is left as it was.
    """
    if isinstance(model, nn.Module) and install.is_peft(model):
        return _accelerate(model, config)
    # PEFT users list the names of several model families at once: for them one match is enough.
    allow_unmatched = config is not None and not is_ours(config)
    ours = as_config(config)
    table = method_of(ours).pefts_targets
    if allow_unmatched and table and ours.target_modules is None:
        ours = dataclasses.replace(ours, target_modules=_pefts_default(model, table))
    return apply_patch(model, ours, adapter_name, allow_unmatched=allow_unmatched)


def _accelerate(model: ModelT, config: Any) -> ModelT:
    if config is not None:
        raise PatchError(
            f"this {type(model).__name__} holds adapters of PEFT's, which patch(model) accelerates in place: "
            f"expected no configuration, got {type(config).__name__}; to add another adapter use PEFT's "
            "model.add_adapter(name, config)"
        )
    if find_state(model) is not None:
        raise PatchError(f"this {type(model).__name__} is already patched by fastpeft; unpatch it first")
    _keep_unpacked(model)
    install.accelerate(model, fuse_blocks, release_blocks)
    logger.info("fastpeft: %s", report(model).summary())
    return model


def _keep_unpacked(*roots: nn.Module) -> None:
    """Of all linears, for those without an adapter have gradients to pass on too; the numbers stay."""
    for root in roots:
        for module in root.modules():
            keep_unpacked(module)


def apply_patch(model: ModelT, config: Any, adapter_name: str, *, allow_unmatched: bool) -> ModelT:
    """:func:`patch`, with the choice whether an entry of the configuration may match nothing."""
    if not isinstance(model, nn.Module):
        raise PatchError(f"patch: expected a torch.nn.Module, got {type(model).__name__}")
    if not adapter_name or "." in adapter_name:
        raise PatchError(f"adapter_name: expected a name without dots, got {adapter_name!r}")
    if (state := find_state(model)) is not None:
        if state.configs.get(adapter_name) == config:
            return model
        beside = "call fastpeft.add_adapter(model, name, config) for another beside it, or "
        raise PatchError(
            f"this {type(model).__name__} is already patched with {state.configs[state.owner]} as "
            f"{state.owner!r}; {beside if method_of(config).has_names else ''}fastpeft.unpatch(model) first"
        )
    _refuse_foreign_adapters(model)
    if install.forget(model):  # its PEFT layers were taken away since it was accelerated
        release_blocks(model)
    plan = method_of(config).plan(model, config, adapter_name, allow_unmatched=allow_unmatched)
    saved = _modules_to_save(model, config, allow_unmatched=allow_unmatched)
    trained = {path: copy.deepcopy(module).requires_grad_(True) for path, module in saved.items()}
    _keep_unpacked(model, *plan.replacements.values())
    _carry_out(model, config, adapter_name, plan, trained)
    logger.info("fastpeft: %s", report(model).summary())
    return model


def _carry_out(
    model: nn.Module, config: Any, adapter_name: str, plan: Plan, trained: dict[str, nn.Module]
) -> None:
    """Do what was planned; ``trained`` are the copies of modules that train whole."""
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    replacements = {**plan.replacements, **trained}
    originals = {path: model.get_submodule(path) for path in replacements}
    witness = next((n for n, p in model.named_parameters() if not _is_inside(n, trained)), "")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, module in replacements.items():
        set_submodule(model, path, module)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained_values = {}
    for name in plan.trained:
        trained_values[name] = parameters[name].detach().clone()
        parameters[name].requires_grad_(True)
    state = PatchState(
        configs={adapter_name: config},
        owner=adapter_name,
        originals=originals,
        requires_grad=requires_grad,
        witness=(witness, parameters[witness].dtype) if witness else ("", torch.float32),
        trained_values=trained_values,
        saved_modules=tuple(trained),
        report=PatchReport((), 0, 0),
    )
    store_state(model, state)
    try:
        plan.finish()
    except BaseException:
        unpatch(model)
        raise
    everything = list(model.parameters())
    whole = (
        ModuleReport(path, "trained", f"{type(module).__name__}, whole (modules_to_save)")
        for path, module in trained.items()
    )
    state.report = PatchReport(
        modules=(*plan.reports, *whole),
        trainable_parameters=sum(p.numel() for p in everything if p.requires_grad),
        total_parameters=sum(p.numel() for p in everything),
        unmatched=plan.unmatched,
    )


def _is_inside(name: str, paths: Mapping[str, object]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def unpatch(model: ModelT) -> ModelT:
    """Take the adapter off: the original modules, requires_grad flags and base values come back bitwise.

    A PEFT model that was accelerated in place keeps its adapters and gets PEFT's own forwards back.

    Raises:
        PatchError: the model is not patched, or modules of it were taken away since; nothing is changed.
    """
    if isinstance(model, nn.Module) and install.find_calls(model) is not None:
        release_blocks(model)
        install.restore(model)
        return model
    state = require_state(model, "unpatch")
    present = dict(model.named_parameters(remove_duplicate=False))
    gone = [name for name in [*state.requires_grad, *state.trained_values] if name not in present]
    if gone:
        raise PatchError(f"unpatch: the model lost parameters that it had at the patch: {listed(gone)}")
    witness, dtype = state.witness
    cast = bool(witness) and present[witness].dtype is not dtype
    method_of(state.configs[state.owner]).detach(model)
    for path, original in state.originals.items():
        _bring_up_to_date(original, model.get_submodule(path), cast=cast)
        set_submodule(model, path, original)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in state.trained_values.items():
            parameters[name].copy_(value)
    for name, flag in state.requires_grad.items():
        parameters[name].requires_grad_(flag)
    store_state(model, None)
    return model


def restore_layer(model: nn.Module, state: PatchState, path: str) -> None:
    """Put the original module of a layer whose last adapter is gone back in its place, wherever it stands."""
    layer = model.get_submodule(path)
    for place in [p for p in state.originals if model.get_submodule(p) is layer]:
        original = state.originals.pop(place)
        _bring_up_to_date(original, layer, cast=False)
        set_submodule(model, place, original)


def report(model: nn.Module) -> PatchReport:
    """Return what :func:`patch` did to every module of the model, and which backend and kernels run it.

    Raises:
        PatchError: the model is not patched.
    """
    if isinstance(model, nn.Module) and install.find_calls(model) is not None:
        return dataclasses.replace(install.report(model), kernels=choices(), blocks=_blocks_of(model))
    done = require_state(model, "report").report
    return dataclasses.replace(done, backend=_backend_of(model), kernels=choices(), blocks=_blocks_of(model))


def _blocks_of(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{path}: {what}" for path, what in described(model))


def _backend_of(model: nn.Module) -> str:
    _, layer = next(adapter_layers(model), ("", None))
    if layer is None:
        return ""  # nothing of ours to run
    try:
        name = backends.resolve(layer.weight, op="report")
    except BackendError as error:
        return f"{backends.get_backend()}, which cannot run: {error}"
    return f"{name} on {layer.weight.device}"


def _refuse_foreign_adapters(model: nn.Module) -> None:
    for path, module in model.named_modules():
        where = f"{path or type(model).__name__}"
        if type(module).__module__.split(".")[0] == "peft":
            raise PatchError(
                f"{where} is PEFT's {type(module).__name__}; expected a plain model to read a folder into; "
                "PEFT's model.load_adapter(folder, name) reads it into this one"
            )
        if find_state(module) is not None or isinstance(module, AdapterMixin):
            raise PatchError(f"{where} is already patched by fastpeft, inside this model")
        if hasattr(module, "lora_A") or hasattr(module, "lora_B"):
            raise PatchError(
                f"{where} ({type(module).__name__}) already carries LoRA adapters of another library; "
                "expected a plain model"
            )


def _pefts_default(model: nn.Module, table: str) -> tuple[str, ...] | None:
    """Return the names that PEFT takes where its configuration has none: its table by model type."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from peft import utils
    except ImportError:  # its configuration came as something that only looks like PEFT's
        return None
    names = getattr(utils, table, {}).get(kind)
    return None if names is None else tuple(names)


def _modules_to_save(model: nn.Module, config: Any, *, allow_unmatched: bool) -> dict[str, nn.Module]:
    """Return the outermost modules that ``modules_to_save`` names, by path."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and trains_whole(path, config):
            found[path] = module
    missing = [n for n in config.modules_to_save if not any(path.endswith(n) for path in found)]
    if missing and not allow_unmatched:
        raise PatchError(f"modules_to_save: no module of the model matches {listed(missing)}")
    for path, module in found.items():
        for name, parameter in module.named_parameters():
            if is_quantised(parameter):
                packed = f" of {type(parameter).__name__}" if parameter.is_floating_point() else ""
                raise PatchError(
                    f"modules_to_save: {path}.{name} is {parameter.dtype}{packed}, expected a floating-point "
                    "type that holds its numbers"
                )
    return found


def _bring_up_to_date(original: nn.Module, current: nn.Module, *, cast: bool) -> None:
    """Carry over to a module that waited outside the model what happened to the one in its place.

    ``cast``: the whole model changed its dtype, so the module follows; the trained copy alone may have been
    cast for training, and that is not carried over.
    """
    original.train(current.training)
    if isinstance(current, AdapterMixin):
        for name in original._parameters:
            original._parameters[name] = current._parameters[name]
        for name in original._buffers:  # like Gemma 3's embed_scale, which a move or a cast replaces
            original._buffers[name] = current._buffers[name]
        return
    pairs = [
        *zip(original.parameters(), current.parameters(), strict=True),
        *zip(original.buffers(), current.buffers(), strict=True),
    ]
    for own, other in pairs:
        own.data = own.data.to(device=other.device, dtype=other.dtype if cast else own.dtype)


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at ``path``."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
