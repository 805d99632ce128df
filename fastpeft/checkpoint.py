"""Save adapters to folders in PEFT's format, and load them: all is compared before anything is copied."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastpeft import folder_files, peft_format, sharding
from fastpeft.adapters import active_adapters, add_adapter, remove_adapter
from fastpeft.config import LoRA
from fastpeft.errors import CheckpointError, ConfigError, PatchError
from fastpeft.folder_files import CONFIG_NAME, WEIGHTS_NAME
from fastpeft.in_place.install import is_peft
from fastpeft.methods.linears import adapter_layers
from fastpeft.methods.lora import is_rewritten
from fastpeft.methods.method import PREFIX
from fastpeft.methods.registry import method_of
from fastpeft.patching import apply_patch, unpatch
from fastpeft.state import PatchState, find_state, require_state
from fastpeft.targets import listed, shown_lines

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ModelT = TypeVar("ModelT", bound=nn.Module)


def save(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write an adapter to a folder that PEFT (``PeftModel.from_pretrained``) and :func:`load` read.

    One whose initialisation rewrote the base (PiSSA, OLoRA) is written as a plain LoRA of twice the rank for
    the base as it was. Methods that PEFT does not have are for :func:`load` alone.

    Args:
        model: a patched model.
        folder: made if it does not exist; files of an earlier save in it are replaced. Of a sharded model
            (FSDP2) every rank must call; the first one writes the whole adapter.
        name: which adapter; default: the active one.

    Returns:
        The folder.

    Raises:
        PatchError: the model is not patched, has no such adapter, or several are active and none was named.
        CheckpointError: the folder cannot be written; files already there stay whole.
    """
    if isinstance(model, nn.Module) and is_peft(model):
        raise PatchError(
            f"save: this {type(model).__name__} holds PEFT's own layers; "
            "PEFT's save_pretrained(folder) writes them"
        )
    state = require_state(model, "save")
    name = _adapter_to_save(model, state, name)
    path = Path(folder)
    live = peft_format.file_tensors(model, state, name)
    tensors = {key: sharding.whole(tensor) for key, tensor in live.items()}
    tensors = method_of(state.configs[name]).in_file(model, name, tensors)
    config = json.dumps(peft_format.to_peft_config(model, state, name), indent=2) + "\n"
    if not sharding.is_sharded(live.values()):
        folder_files.write(path, tensors, config)
    elif error := sharding.on_first_rank(lambda: folder_files.write(path, tensors, config)):
        raise CheckpointError(error)
    return path


def load(model: ModelT, folder: str | os.PathLike[str], name: str = "default") -> ModelT:
    """Read an adapter folder, written by :func:`save` or by PEFT, into the model.

    A model that is not patched is patched as the folder's configuration says. A patched one that has no
    adapter of this name gets it beside the others (:func:`fastpeft.set_adapter` makes it active). An adapter
    of this name must have the same modules, ranks, scaling and method, and takes the folder's values into its
    Parameters; :func:`hotswap` asks for less.

    Args:
        model: the base model, patched or not.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: the adapter's name in the model.

    Returns:
        The same model.

    Raises:
        CheckpointError: the folder is missing, damaged, of another base model or of another method; the
            message lists what differs and the model is left as it was.
        PatchError: the adapter is merged, so its values play no part in forward; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"load: expected a torch.nn.Module, got {type(model).__name__}")
    path = Path(folder)
    config = folder_files.read_config(path)
    method, ours = peft_format.from_peft_config(config, str(path / CONFIG_NAME))
    tensors = _read_weights(path)
    method.check_file(path, ours, tensors)
    found = find_state(model)
    if found is not None:
        _refuse_merged(model, found, name, "load")
    patched_here, added_here = found is None, found is not None and name not in found.configs
    try:
        if patched_here:
            apply_patch(model, ours, name, allow_unmatched=True)
        elif added_here:
            add_adapter(model, name, ours, allow_unmatched=True)
    except (PatchError, ConfigError) as error:
        raise CheckpointError(f"{path} does not fit this model{_bases(model, config)}: {error}") from error
    state = require_state(model, "load")
    try:
        if not patched_here and not added_here:
            _compare_configs(path, model, state, name, ours)
        live = peft_format.file_tensors(model, state, name)
        tensors = _without_base_copies(model, live, tensors)
        _compare_tensors(path, live, tensors, _bases(model, config))
    except CheckpointError:
        if patched_here:
            unpatch(model)
        elif added_here:
            remove_adapter(model, name)
        raise
    with torch.no_grad():
        for key, tensor in live.items():
            sharding.copy_into(tensor, tensors[key])
    _warn_of_other_base(path, model, config)
    return model


def hotswap(model: ModelT, folder: str | os.PathLike[str], name: str = "default") -> ModelT:
    """Put another adapter's values into an adapter's Parameters, without a new tensor, shape or number.

    A compiled model, an optimiser and CUDA graphs see the same Parameters: nothing compiles anew. A folder
    of lower rank fills up with zeros, one of another scaling has the ratio folded into its B. So a model that
    is to take several adapters in turn is patched with the highest of their ranks.

    Args:
        model: a patched model with an adapter of this name.
        folder: an adapter of the same modules and method, whose ranks are no higher.
        name: the adapter's name in the model.

    Raises:
        PatchError: the model is not patched, has no adapter of this name, or it is merged.
        CheckpointError: the folder does not fit; the message lists what differs, and nothing is changed.
    """
    state = require_state(model, "hotswap")
    _adapter_to_save(model, state, name)
    _refuse_merged(model, state, name, "hotswap")
    path = Path(folder)
    config = folder_files.read_config(path)
    _, theirs = peft_format.from_peft_config(config, str(path / CONFIG_NAME))
    if not isinstance(state.configs[name], LoRA) or not isinstance(theirs, LoRA):
        raise CheckpointError(
            f"hotswap takes a LoRA for a LoRA: {name!r} is {type(state.configs[name]).__name__}, "
            f"{path} holds {type(theirs).__name__}"
        )
    if is_rewritten(model) or theirs.rewrites_base:
        raise CheckpointError(f"hotswap: {name!r} or {path} is for a rewritten base (PiSSA, OLoRA)")
    tensors = _read_weights(path)
    parameters = peft_format.file_tensors(model, state, name)
    tensors = _without_base_copies(model, parameters, tensors)
    prepared: dict[str, Tensor] = {}
    for module, layer in adapter_layers(model):
        spec = layer.specs.get(name)
        if spec is None:
            continue
        if spec.use_dora != theirs.use_dora or theirs.rank_of(module) > spec.r:
            raise CheckpointError(
                f"{path} does not fit the adapter {name!r}: {module} has r={spec.r} and "
                f"use_dora={spec.use_dora}, the folder has r={theirs.rank_of(module)} and "
                f"use_dora={theirs.use_dora}; expected at most that rank and that method"
            )
        ratio = theirs.scaling_of(module) / spec.scaling
        for key, parameter in parameters.items():
            if key.startswith(f"{PREFIX}{module}.lora_") and key in tensors:
                prepared[key] = _padded(tensors[key], parameter, key, ratio)
    _compare_tensors(path, parameters, {**tensors, **prepared}, _bases(model, config))
    with torch.no_grad():
        for key, parameter in parameters.items():
            sharding.copy_into(parameter, prepared.get(key, tensors[key]))
    return model


def _refuse_merged(model: nn.Module, state: PatchState, name: str, verb: str) -> None:
    if name in state.configs and method_of(state.configs[name]).is_merged(model, name):
        raise PatchError(
            f"{verb}: {name!r} is merged, so new values would play no part; "
            "call fastpeft.unmerge(model) first"
        )


def _padded(tensor: Tensor, like: Tensor, key: str, ratio: float) -> Tensor:
    """A lora_A or lora_B of lower rank filled up with zeros; B times the ratio of the scalings."""
    if ".lora_A" in key or ".lora_embedding_A" in key:
        return torch.nn.functional.pad(tensor, (0, 0, 0, like.shape[0] - tensor.shape[0]))
    if ".lora_B" in key or ".lora_embedding_B" in key:
        return torch.nn.functional.pad(tensor.float() * ratio, (0, like.shape[1] - tensor.shape[1]))
    return tensor


def _adapter_to_save(model: nn.Module, state: PatchState, name: str | None) -> str:
    if name is None and not method_of(state.configs[state.owner]).has_names:
        return state.owner
    if name is None:
        active = active_adapters(model)
        if len(active) != 1:
            raise PatchError(f"save: {listed(active)} are active; name the adapter to save")
        return active[0]
    if name not in state.configs:
        raise PatchError(f"the model has no adapter {name!r}; it has {listed(list(state.configs))}")
    return name


def _read_weights(path: Path) -> dict[str, Tensor]:
    found = {
        peft_format.normalised_key(key): tensor
        for key, tensor in folder_files.read_weights(path).items()
        if not peft_format.is_redundant(key)
    }
    for key, tensor in found.items():
        if tensor.dtype not in _FLOATING:
            wanted = ", ".join(str(dtype) for dtype in _FLOATING)
            raise CheckpointError(f"{path / WEIGHTS_NAME}: {key} is {tensor.dtype}, expected one of {wanted}")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path / WEIGHTS_NAME}: {key} holds values that are not finite")
    return found


def _compare_configs(path: Path, model: nn.Module, state: PatchState, name: str, theirs: object) -> None:
    ours = state.configs[name]
    if type(ours) is not type(theirs):
        lines = [f"{name!r} is {type(ours).__name__}, the folder holds {type(theirs).__name__}"]
    else:
        lines = method_of(ours).differences(model, name, theirs)
    if lines:
        raise CheckpointError(f"{path} does not fit the patched model:\n  " + shown_lines(lines))


def _compare_tensors(
    path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], bases: str
) -> None:
    differences = [
        f"{key}: expected shape {list(expected[key].shape)}, got {list(found[key].shape)}"
        for key in expected.keys() & found.keys()
        if expected[key].shape != found[key].shape
    ]
    differences += [f"{key}: missing in the file" for key in expected.keys() - found.keys()]
    differences += [f"{key}: in the file, not in the model" for key in found.keys() - expected.keys()]
    if differences:
        file = path / WEIGHTS_NAME
        raise CheckpointError(f"{file} does not fit the model{bases}:\n  " + shown_lines(sorted(differences)))


def _without_base_copies(
    model: nn.Module, expected: Mapping[str, Tensor], found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Leave out what PEFT saves of the base beside an adapted embedding, where it is what the model has."""
    base = dict(model.named_parameters(remove_duplicate=False))

    def is_copy(key: str, tensor: Tensor) -> bool:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        own = base.get(name)
        return own is not None and own.shape == tensor.shape and torch.equal(own.cpu(), tensor.to(own.dtype))

    return {key: t for key, t in found.items() if key in expected or not is_copy(key, t)}


def _bases(model: nn.Module, config: Mapping[str, object]) -> str:
    theirs, ours = str(config.get("base_model_name_or_path") or ""), peft_format.base_model_name(model)
    if not theirs:
        return ""
    return f" (the adapter was made for {theirs!r}, the model is {ours or type(model).__name__!r})"


def _warn_of_other_base(path: Path, model: nn.Module, config: Mapping[str, object]) -> None:
    theirs, ours = str(config.get("base_model_name_or_path") or ""), peft_format.base_model_name(model)
    if theirs and ours and Path(theirs).name != Path(ours).name:
        warnings.warn(
            f"{path}: the adapter fits, but was made for {theirs!r} and the model is {ours!r}", stacklevel=3
        )
