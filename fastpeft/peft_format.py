"""PEFT's checkpoint format: which key belongs to which tensor, and what ``adapter_config.json`` says."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpeft.errors import CheckpointError, ConfigError
from fastpeft.methods.linears import adapter_layers
from fastpeft.methods.method import PREFIX, Method
from fastpeft.methods.registry import method_of, read_content
from fastpeft.state import PatchState

# Only where PEFT's class for the task trains nothing on its own accord.
_TASK_TYPES = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


def file_tensors(model: nn.Module, state: PatchState, name: str) -> dict[str, Tensor]:
    """Return what an adapter's file holds, by its key in it, in the model's order."""
    found = method_of(state.configs[name]).tensors(model, name)
    if name != state.owner:
        return found
    layers = dict(adapter_layers(model))
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
    """Return a file's key as :func:`file_tensors` spells it (older PEFT: ``m.weight``)."""
    return key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key


def to_peft_config(model: nn.Module, state: PatchState, name: str) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for one of the model's adapters."""
    config = state.configs[name]
    method = method_of(config)
    content = {
        "task_type": next((t for end, t in _TASK_TYPES.items() if type(model).__name__.endswith(end)), None),
        **method.content(model, config, name),
        "peft_type": method.peft_type,
        "base_model_name_or_path": base_model_name(model) or None,
        "inference_mode": True,
        "modules_to_save": list(config.modules_to_save) or None,
    }
    return dict(sorted(content.items()))


def from_peft_config(content: object, where: str) -> tuple[Method, Any]:
    """Return the method and the configuration that the content of ``adapter_config.json`` describes.

    Raises:
        CheckpointError: it describes something that fastpeft cannot load.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(content).__name__}")
    try:
        return read_content(content)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def base_model_name(model: nn.Module) -> str:
    """Return the name or path a transformers model was loaded from, or an empty string."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
