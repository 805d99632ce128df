"""LoRA, DoRA, rsLoRA, LoRA-FA and the initialisations that move a part of the base into the adapter.

Such an adapter (PiSSA, OLoRA) belongs to a rewritten base ``W - s B_0 A_0``. Its file is made for the base as
it was: ``W - s B_0 A_0 + s B A = W + s [B, -B_0] [A; A_0]`` is a plain LoRA of twice the rank, which every
reader of LoRA files applies to the very base model. (PEFT's ``path_initial_model_for_weight_conversion``.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.config import NOT_IN_FILES, LoRA
from fastpeft.errors import CheckpointError, ConfigError, PatchError
from fastpeft.folder_files import CONFIG_NAME, WEIGHTS_NAME
from fastpeft.layers.adapter import AdapterSpec, Spec
from fastpeft.layers.kinds import is_quantised
from fastpeft.methods.linears import LinearMethod, adapter_layers, is_transposed, target_names, tied_to
from fastpeft.methods.method import PREFIX, Differences
from fastpeft.targets import listed, shown_lines

# A configuration may name a rank that no module of the file has, but not one that could fill the memory.
_LARGEST_UNUSED_RANK = 4096
_A_KEYS = (".lora_A.weight", ".lora_embedding_A")


class LoRAMethod(LinearMethod):
    """:class:`fastpeft.LoRA` in the verbs; the files are PEFT's."""

    config = LoRA
    peft_type = "LORA"
    pefts_targets = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"

    def specs(self, model: nn.Module, config: LoRA, targets: Mapping[str, nn.Module]) -> dict[str, Spec]:
        """Rank and scaling of every target.

        Raises:
            PatchError: the base is to be rewritten, and a weight is quantised or tied.
        """
        if config.rewrites_base:
            _refuse_fixed(model, config, targets)
        return {path: _spec(config, path) for path in targets}

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """A, B and DoRA's magnitude of every module, in the model's order."""
        found: dict[str, Tensor] = {}
        for path, layer in adapter_layers(model):
            if name in layer.specs:
                for kind in layer.specs[name].kinds:
                    key = _key(kind, is_embedding=isinstance(layer, nn.Embedding))
                    found[f"{PREFIX}{path}.{key}"] = getattr(layer, kind)[name]
        return found

    def in_file(self, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As a plain LoRA of twice the rank, where the base was rewritten."""
        if not is_rewritten(model):
            return tensors
        found = dict(tensors)
        for path, layer in adapter_layers(model):
            key_A, key_B = (
                f"{PREFIX}{path}.{_key(kind, is_embedding=isinstance(layer, nn.Embedding))}"
                for kind in ("lora_A", "lora_B")
            )
            A, B, start = tensors[key_A], tensors[key_B], layer.rewritten
            if start is None:
                found[key_A], found[key_B] = F.pad(A, (0, 0, 0, len(A))), F.pad(B, (0, B.shape[1]))
            else:
                found[key_A] = torch.cat([A, start.lora_A.to(A.dtype)])
                found[key_B] = torch.cat([B, -start.lora_B.to(B.dtype)], dim=1)
        return found

    def content(self, model: nn.Module, config: LoRA, name: str) -> dict[str, Any]:
        """PEFT's fields."""
        if is_rewritten(model):
            config = config.doubled()
        content = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        for own in NOT_IN_FILES:
            del content[own]
        content.update(
            fan_in_fan_out=is_transposed(model, name),
            target_modules=target_names(model, name, config.modules_to_save),
            exclude_modules=None,
            layers_to_transform=None,
        )
        return content

    def read(self, content: Mapping[str, Any]) -> LoRA:
        """The file's adapter replaces what the initialisation gave, unless that rewrote the base as well.

        Raises:
            ConfigError: a field is not honoured, or the rewritten base cannot be had again.
        """
        initialised = content.get("init_lora_weights", True)
        if str(initialised).startswith("pissa_niter_"):
            raise ConfigError(
                f"init_lora_weights={initialised!r}: the adapter belongs to a base rewritten at random, "
                "which cannot be had again; save it with PEFT's path_initial_model_for_weight_conversion"
            )
        if initialised in (True, False, "gaussian", "orthogonal", "eva"):
            content = {**content, "init_lora_weights": True}
        return LoRA.from_peft(content)

    def translate(self, config: Any) -> LoRA:
        """A ``peft.LoraConfig``."""
        return LoRA.from_peft(config)

    def check_file(self, path: Path, config: LoRA, tensors: Mapping[str, Tensor]) -> None:
        """The ranks that the configuration declares are those of the file."""
        ranks = {
            key.removeprefix(PREFIX).removesuffix(end): tensor.shape[0]
            for key, tensor in tensors.items()
            for end in _A_KEYS
            if key.endswith(end) and tensor.dim() == 2
        }
        if not ranks:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: holds no lora_A")
        declared = {module: config.rank_of(module) for module in ranks}
        if wrong := [m for m in ranks if declared[m] != ranks[m]]:
            lines = [f"{m}: declared r={declared[m]}, the file's lora_A has {ranks[m]} rows" for m in wrong]
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} and {WEIGHTS_NAME} do not belong together:\n  " + shown_lines(lines)
            )
        most = max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
        if most > max(*ranks.values(), _LARGEST_UNUSED_RANK):
            raise CheckpointError(
                f"{path / CONFIG_NAME}: r={most}, but the file's ranks end at {max(ranks.values())}"
            )

    def differences(self, model: nn.Module, name: str, config: LoRA) -> Differences:
        """Rank, scaling and method of every module; and the base that the adapter is for."""
        if is_rewritten(model):
            return [
                f"the model's base was rewritten by {name!r}'s initialisation, and the folder's adapter is "
                "for the base as it was; fastpeft.unpatch(model) first"
            ]
        if config.rewrites_base:
            return [f"the folder's adapter is for a base rewritten by {config.init_lora_weights!r}"]
        lines = []
        for path, layer in adapter_layers(model):
            if (spec := layer.specs.get(name)) is None:
                continue
            expected = (spec.r, spec.scaling, spec.use_dora)
            found = (config.rank_of(path), config.scaling_of(path), config.use_dora)
            if expected != found:
                lines.append(
                    f"{path}: the model has r={expected[0]}, scaling={expected[1]:g}, "
                    f"use_dora={expected[2]}; the folder has r={found[0]}, scaling={found[1]:g}, "
                    f"use_dora={found[2]}"
                )
        return lines


def is_rewritten(model: nn.Module) -> bool:
    """Whether a part of the model's base weights was moved into its adapter."""
    return any(layer.rewritten is not None for _, layer in adapter_layers(model))


def _spec(config: LoRA, path: str) -> AdapterSpec:
    return AdapterSpec(
        r=config.rank_of(path),
        scaling=config.scaling_of(path),
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        dropout_on_base=config.dora_dropout == "base_and_adapter",
        init_lora_weights=config.init_lora_weights,
        freeze_lora_A=config.freeze_lora_A,
    )


def _key(kind: str, *, is_embedding: bool) -> str:
    if kind == "lora_magnitude_vector":
        return kind
    return kind.replace("lora_", "lora_embedding_") if is_embedding else f"{kind}.weight"


def _refuse_fixed(model: nn.Module, config: LoRA, targets: Mapping[str, nn.Module]) -> None:
    how = f"init_lora_weights={config.init_lora_weights!r} rewrites the base weights"
    linears = [path for path, module in targets.items() if not isinstance(module, nn.Embedding)]
    for path in linears:
        weight: Any = targets[path].weight
        if is_quantised(weight):
            raise PatchError(f"{path}: {how}, and this one is quantised")
    for path, others in tied_to(model, linears):
        raise PatchError(f"{path}: {how}, and this one is tied to {listed(others)}; leave it out")
