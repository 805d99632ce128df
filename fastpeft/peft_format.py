"""PEFT's checkpoint format: which key belongs to which Parameter, and what ``adapter_config.json`` says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastpeft.config import LoRA
from fastpeft.errors import CheckpointError, ConfigError
from fastpeft.layers.adapter import AdapterMixin
from fastpeft.layers.kinds import is_conv1d_like
from fastpeft.patching import adapter_layers
from fastpeft.state import PatchState
from fastpeft.targets import match_names

PREFIX = "base_model.model."
# Only where PEFT's class for the task trains nothing on its own accord.
_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


def file_parameters(model: nn.Module, state: PatchState, name: str) -> dict[str, nn.Parameter]:
    """Return the Parameters that an adapter's file holds, by their key in it, in the model's order."""
    layers = dict(adapter_layers(model))
    found: dict[str, nn.Parameter] = {}
    for path, layer in layers.items():
        if name not in layer.specs:
            continue
        for matrix in ("A", "B"):
            key = f"lora_embedding_{matrix}" if _is_embedding(layer) else f"lora_{matrix}.weight"
            found[f"{PREFIX}{path}.{key}"] = getattr(layer, f"lora_{matrix}")[name]
        if layer.specs[name].use_dora:
            found[f"{PREFIX}{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name]
    if name != state.owner:
        return found
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for bias_name in state.trained_values:
        owner = bias_name.rpartition(".")[0]
        key = f"{owner}.base_layer.bias" if owner in layers else bias_name
        found[f"{PREFIX}{key}"] = parameters[bias_name]
    for path in state.saved_modules:
        for parameter_name, parameter in model.get_submodule(path).named_parameters():
            found[f"{PREFIX}{path}.{parameter_name}"] = parameter
    return found


def is_redundant(key: str) -> bool:
    """Whether PEFT wrote a key twice: with ``bias="all"`` its wrappers' inner names appear as well."""
    return ".modules_to_save." in key or ".original_module." in key


def normalised_key(key: str) -> str:
    """Return a file's key as :func:`file_parameters` spells it (older PEFT: ``m.weight``)."""
    return key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key


def to_peft_config(model: nn.Module, state: PatchState, name: str) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for one of the model's adapters.

    ``target_modules`` is written out, as the shortest names that mean exactly the patched modules, so that
    PEFT and another version of fastpeft find the same ones.
    """
    layers = {path: layer for path, layer in adapter_layers(model) if name in layer.specs}
    config = state.configs[name]
    content: dict[str, Any] = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
    }
    del content["dora_dropout"]  # no field of PEFT's
    content.update(
        peft_type="LORA",
        task_type=next((t for end, t in _TASK_TYPES.items() if type(model).__name__.endswith(end)), None),
        base_model_name_or_path=base_model_name(model) or None,
        inference_mode=True,
        fan_in_fan_out=any(_is_transposed(layer) for layer in layers.values()),
        target_modules=_shortest_names(model, layers, config.modules_to_save),
        exclude_modules=None,
        layers_to_transform=None,
        modules_to_save=list(config.modules_to_save) or None,
    )
    return dict(sorted(content.items()))


def from_peft_config(content: object, where: str) -> LoRA:
    """Return the LoRA that the content of ``adapter_config.json`` describes.

    Raises:
        CheckpointError: it describes something that fastpeft cannot load.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(content).__name__}")
    # A file's adapter replaces what the initialisation gave, unless that changed the base weight as well.
    initialised = content.get("init_lora_weights", True)
    if initialised in (True, False, "gaussian", "orthogonal", "eva"):
        content = {**content, "init_lora_weights": True}
    try:
        return LoRA.from_peft(content)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def base_model_name(model: nn.Module) -> str:
    """Return the name or path a transformers model was loaded from, or an empty string."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")


def _is_transposed(layer: AdapterMixin) -> bool:
    return is_conv1d_like(layer)


def _is_embedding(layer: AdapterMixin) -> bool:
    return isinstance(layer, nn.Embedding)


def _shortest_names(model: nn.Module, layers: Iterable[str], modules_to_save: tuple[str, ...]) -> list[str]:
    """Return last name components where PEFT's rule makes them mean exactly ``layers``; else whole paths."""
    wanted = set(layers)
    names = sorted({path.rpartition(".")[2] for path in wanted})
    inside_layer = re.compile("|".join(re.escape(f"{path}.") for path in wanted)) if wanted else None
    matched = {
        path
        for path, _ in model.named_modules()
        if match_names(names, path)
        and not (inside_layer and inside_layer.match(path))
        and not any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", path) for saved in modules_to_save)
    }
    return names if matched == wanted else sorted(wanted)
