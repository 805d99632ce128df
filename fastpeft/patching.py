"""Put adapters on a model in place, and take them off again.

``patch`` first plans (everything that can fail fails here, with the model untouched), then builds the new
modules, then swaps them in.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastpeft import backend as backends
from fastpeft.blocks.install import described, fuse_blocks, release_blocks
from fastpeft.choice import choices
from fastpeft.config import LoRA, as_lora
from fastpeft.errors import BackendError, PatchError
from fastpeft.in_place import install
from fastpeft.layers.adapter import AdapterMixin, AdapterSpec
from fastpeft.layers.kinds import adapter_class
from fastpeft.patch_report import ModuleReport, PatchReport
from fastpeft.state import PatchState, find_state, require_state, store_state
from fastpeft.targets import Selection, listed, select, trains_whole

logger = logging.getLogger("fastpeft")
ModelT = TypeVar("ModelT", bound=nn.Module)


def patch(model: ModelT, config: Any = None, *, adapter_name: str = "default") -> ModelT:
    """Put a LoRA or DoRA adapter on the model's linear layers, in place, and freeze everything else.

    A model that already holds PEFT's LoRA layers (a ``PeftModel``, ``inject_adapter_in_model``'s or
    transformers' ``add_adapter``'s) is accelerated in place instead: its modules, Parameters, state_dict keys
    and everything PEFT can do to it stay as they are, and adapters that PEFT adds later are accelerated too.

    Args:
        model: any ``nn.Module``, usually a transformers model. Its linears keep their weights (the same
            Parameter objects, tied ones stay tied); their modules are replaced by drop-in ones.
        config: a :class:`fastpeft.LoRA`, a ``peft.LoraConfig``, or None for LoRA with r=16 on every linear
            inside the repeated blocks. None for a model with PEFT's layers.
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
    allow_unmatched = config is not None and not isinstance(config, LoRA)
    lora = as_lora(config)
    if allow_unmatched and lora.target_modules is None and (names := _pefts_default(model)):
        lora = dataclasses.replace(lora, target_modules=names)
    return apply_patch(model, lora, adapter_name, allow_unmatched=allow_unmatched)


def _accelerate(model: ModelT, config: Any) -> ModelT:
    if config is not None:
        raise PatchError(
            f"this {type(model).__name__} holds adapters of PEFT's, which patch(model) accelerates in place: "
            f"expected no configuration, got {type(config).__name__}; to add another adapter use PEFT's "
            "model.add_adapter(name, config)"
        )
    if find_state(model) is not None:
        raise PatchError(f"this {type(model).__name__} is already patched by fastpeft; unpatch it first")
    install.accelerate(model, fuse_blocks)
    logger.info("fastpeft: %s", report(model).summary())
    return model


def apply_patch(model: ModelT, config: LoRA, adapter_name: str, *, allow_unmatched: bool) -> ModelT:
    """:func:`patch`, with the choice whether an entry of ``target_modules`` may match nothing."""
    if not isinstance(model, nn.Module):
        raise PatchError(f"patch: expected a torch.nn.Module, got {type(model).__name__}")
    if not adapter_name or "." in adapter_name:
        raise PatchError(f"adapter_name: expected a name without dots, got {adapter_name!r}")
    if (state := find_state(model)) is not None:
        if state.configs.get(adapter_name) == config:
            return model
        raise PatchError(
            f"this {type(model).__name__} is already patched with {state.configs[state.owner]} as "
            f"{state.owner!r}; call fastpeft.add_adapter(model, name, config) for another beside "
            "it, or fastpeft.unpatch(model) first"
        )
    _refuse_foreign_adapters(model)
    selection = select(model, config, allow_unmatched=allow_unmatched)
    saved = _modules_to_save(model, config, allow_unmatched=allow_unmatched)
    replacements = build_layers(selection.targets, config, adapter_name)
    for layer in replacements.values():
        layer.active_adapters = (adapter_name,)
    trained = {path: copy.deepcopy(module).requires_grad_(True) for path, module in saved.items()}
    _swap_in(model, config, adapter_name, selection, replacements, trained)
    logger.info("fastpeft: %s", report(model).summary())
    return model


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
    first_layer = next(layer for _, layer in adapter_layers(model))
    cast = first_layer.weight.dtype is not state.base_dtype
    for path, layer in adapter_layers(model):
        if layer.merged_adapters and layer._unmerged is None:
            raise PatchError(f"unpatch: {path} was merged with keep_base=False, its base weight is gone")
    for _, layer in adapter_layers(model):
        if layer.merged_adapters:
            layer.unmerge()
    release_blocks(model)
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
    _, layer = next(adapter_layers(model))
    try:
        name = backends.resolve(layer.weight, op="report")
    except BackendError as error:
        return f"{backends.get_backend()}, which cannot run: {error}"
    return f"{name} on {layer.weight.device}"


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterMixin]]:
    """Yield (path, module) of every patched layer, each once, in the model's order."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, AdapterMixin))


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


def _pefts_default(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names that PEFT takes where its configuration has none: its table by model type."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE
    except ImportError:  # its configuration came as something that only looks like PEFT's
        return None
    names = TABLE.get(kind)
    return None if names is None else tuple(names)


def _modules_to_save(model: nn.Module, config: LoRA, *, allow_unmatched: bool) -> dict[str, nn.Module]:
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
            if not parameter.is_floating_point():
                raise PatchError(
                    f"modules_to_save: {path}.{name} is {parameter.dtype}, expected a floating-point type"
                )
    return found


def build_layers(
    targets: Mapping[str, nn.Module], config: LoRA, adapter_name: str
) -> dict[str, AdapterMixin]:
    """Return the replacement of every target, with the adapter; one that several paths share is made once."""
    by_identity: dict[int, AdapterMixin] = {}
    replacements: dict[str, AdapterMixin] = {}
    for path, module in targets.items():
        if id(module) not in by_identity:
            kind = adapter_class(module)
            assert kind is not None, path  # select() has checked it
            layer = kind.__new__(kind)
            layer.adopt(module)
            layer.add_adapter(adapter_name, spec_for(config, path))
            by_identity[id(module)] = layer
        replacements[path] = by_identity[id(module)]
    return replacements


def spec_for(config: LoRA, path: str) -> AdapterSpec:
    """Return one module's share of a configuration."""
    return AdapterSpec(
        r=config.rank_of(path),
        scaling=config.scaling_of(path),
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        dropout_on_base=config.dora_dropout == "base_and_adapter",
        init_lora_weights=config.init_lora_weights,
    )


def _swap_in(
    model: nn.Module,
    config: LoRA,
    adapter_name: str,
    selection: Selection,
    replacements: dict[str, AdapterMixin],
    trained: dict[str, nn.Module],
) -> None:
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    originals = {path: model.get_submodule(path) for path in [*replacements, *trained]}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, module in [*replacements.items(), *trained.items()]:
        set_submodule(model, path, module)
    biases = dict(_trained_biases(model, config))
    for bias in biases.values():
        bias.requires_grad_(True)
    parameters = list(model.parameters())
    state = PatchState(
        configs={adapter_name: config},
        owner=adapter_name,
        originals=originals,
        requires_grad=requires_grad,
        base_dtype=next(iter(replacements.values())).weight.dtype,
        trained_values={name: bias.detach().clone() for name, bias in biases.items()},
        saved_modules=tuple(trained),
        report=PatchReport(
            modules=tuple(_module_reports(model, selection, replacements, trained)),
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            total_parameters=sum(p.numel() for p in parameters),
            unmatched=selection.unmatched,
        ),
    )
    store_state(model, state)
    fuse_blocks(model)


def _trained_biases(model: nn.Module, config: LoRA) -> Iterator[tuple[str, Tensor]]:
    """Yield (qualified name, Parameter) of the base's biases that the configuration trains."""
    if config.bias == "all":
        named = model.named_parameters(remove_duplicate=False)  # PEFT's files hold a tied one twice
        yield from ((n, p) for n, p in named if n.rpartition(".")[2] == "bias")
    elif config.bias == "lora_only":
        yield from ((f"{n}.bias", m.bias) for n, m in adapter_layers(model) if m.bias is not None)


def _module_reports(
    model: nn.Module,
    selection: Selection,
    replacements: dict[str, AdapterMixin],
    trained: dict[str, nn.Module],
) -> Iterator[ModuleReport]:
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    for path, layer in replacements.items():
        tied = [other for other in owners[id(layer.weight)] if other not in replacements]
        detail = layer.adapter_repr() + (f", weight tied to {listed(tied)}" if tied else "")
        yield ModuleReport(path, "patched", detail)
    for path, module in trained.items():
        yield ModuleReport(path, "trained", f"{type(module).__name__}, whole (modules_to_save)")
    for path, reason in selection.skipped.items():
        if path not in trained:
            yield ModuleReport(path, "skipped", reason)


def _bring_up_to_date(original: nn.Module, current: nn.Module, *, cast: bool) -> None:
    """Carry over to a module that waited outside the model what happened to the one in its place.

    ``cast``: the whole model changed its dtype, so the module follows; the trained copy alone may have been
    cast for training, and that is not carried over.
    """
    original.train(current.training)
    if isinstance(current, AdapterMixin):
        for name in original._parameters:
            original._parameters[name] = current._parameters[name]
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
