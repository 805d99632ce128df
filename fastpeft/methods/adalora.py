"""AdaLoRA (arXiv 2303.10512): a budget of ranks, spent where they matter, found out during training.

The formula is in :mod:`fastpeft.layers.adalora`, who gets which rank in :mod:`fastpeft.allocation`; the files
are PEFT's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastpeft import fields
from fastpeft.errors import CheckpointError, ConfigError, PatchError
from fastpeft.folder_files import CONFIG_NAME, WEIGHTS_NAME
from fastpeft.layers.adalora import AdaLoRASpec, OrthogonalLoss, Pattern, Ranks
from fastpeft.layers.adapter import AdapterMixin, Spec
from fastpeft.methods.linears import LinearMethod, adapter_layers, is_transposed, target_names
from fastpeft.methods.method import PREFIX, Differences
from fastpeft.targets import shown_lines

Bias = Literal["none", "all", "lora_only"]
_E = ".lora_E"
# Fields of peft.AdaLoraConfig, inherited from LoraConfig, that AdaLoRA does not read.
_UNREAD = (
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "r",
)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA:
    """AdaLoRA on chosen linear layers. Names, meanings and defaults are those of ``peft.AdaLoraConfig``.

    For the first ``tinit`` steps every layer has its ``init_r`` triplets; then they become fewer, by a cubic
    schedule, until ``tfinal`` steps before the end there are ``target_r`` a layer on average; those stay.
    :class:`fastpeft.RankAllocator` (or :func:`fastpeft.update_and_allocate`) does that during training:
    without it all ranks stay as they were.

    Attributes:
        target_r: mean rank in the end.
        init_r: rank of every layer at first.
        tinit: steps before the first allocation.
        tfinal: steps after the last.
        deltaT: steps from one allocation to the next.
        beta1: of the running mean of the sensitivity ``|w * dL/dw|``.
        beta2: of the running mean of its deviation from that, the uncertainty.
        orth_reg_weight: of the regulariser (:mod:`fastpeft.ops.orthogonality`) in the loss. It is added to
            ``output.loss`` of a patched model in training; where the loss is made elsewhere, add
            :func:`fastpeft.orthogonal_regularization`.
        total_step: optimiser steps of the whole training; there is no default.
        lora_alpha: the update is scaled by ``lora_alpha / (init_r + 1e-5)``.
        lora_dropout: probability of zeroing an element of the adapter's input during training.
        target_modules: as in :class:`fastpeft.LoRA`.
        exclude_modules: names, suffixes or one regular expression, taken out of ``target_modules``.
        init_lora_weights: False starts with random E, A and B, so that the update is not zero.
        bias: which biases of the base train: ``"none"``, ``"all"``, or ``"lora_only"`` (of patched modules).
        modules_to_save: modules trained whole and saved with the adapter: every one whose path ends so.
        layers_to_transform: indices of the repeated blocks to patch; None means all.
        rank_pattern: of a trained adapter: by ``path.lora_E``, which of the ``init_r`` triplets are kept. The
            layers are made so small, and their ranks are final.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int = 0
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    init_lora_weights: bool = True
    bias: Bias = "none"
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, tuple[bool, ...]] | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("init_r", 1),
            ("target_r", 1),
            ("total_step", 1),
            ("tinit", 0),
            ("tfinal", 0),
            ("deltaT", 1),
        ):
            fields.check_count(name, getattr(self, name), least)
        if self.target_r > self.init_r:
            raise ConfigError(
                f"target_r: expected at most init_r={self.init_r}, the rank at first, got {self.target_r}"
            )
        if self.tinit + self.tfinal >= self.total_step:
            raise ConfigError(
                "tinit + tfinal: expected fewer steps than total_step, which leaves some to allocate in, "
                f"got {self.tinit} + {self.tfinal} of {self.total_step}"
            )
        for name in ("beta1", "beta2"):
            fields.check_probability(name, getattr(self, name))
            fields.check_positive(name, getattr(self, name))
        if not fields.is_number(self.orth_reg_weight) or self.orth_reg_weight < 0:
            raise ConfigError(
                f"orth_reg_weight: expected a number of at least 0, got {self.orth_reg_weight!r}"
            )
        fields.check_positive("lora_alpha", self.lora_alpha)
        fields.check_probability("lora_dropout", self.lora_dropout)
        fields.check_one_of("bias", self.bias, get_args(Bias))
        fields.check_flag("init_lora_weights", self.init_lora_weights)
        fields.settle_selection(self)
        object.__setattr__(self, "rank_pattern", _checked_pattern(self.rank_pattern, self.init_r))

    def kept(self, module_path: str) -> tuple[bool, ...] | None:
        """Return which triplets ``rank_pattern`` keeps of a module, None where it does not name it."""
        return None if self.rank_pattern is None else self.rank_pattern.get(module_path + _E)

    def rank_of(self, module_path: str) -> int:
        """Return the rank that a module is made with."""
        kept = self.kept(module_path)
        return self.init_r if kept is None else sum(kept)

    @classmethod
    def from_peft(cls, config: Any) -> AdaLoRA:
        """Return the AdaLoRA that a ``peft.AdaLoraConfig`` (or its ``to_dict()``) describes.

        Raises:
            ConfigError: it is not an AdaLoRA configuration, or it sets fields that fastpeft does not honour.
        """
        kind, values = fields.read_peft(config)
        if kind != "ADALORA":
            raise ConfigError(f"expected a peft.AdaLoraConfig (peft_type ADALORA), got peft_type {kind!r}")
        ours = {f.name for f in dataclasses.fields(cls)}
        if unsupported := fields.not_honoured(values, {*ours, *_UNREAD}):
            raise ConfigError(
                f"peft.AdaLoraConfig sets what fastpeft does not honour: {', '.join(unsupported)}"
            )
        values["modules_to_save"] = fields.trained_heads(values)
        # PEFT's AdaLoRA has two ways to start, whatever LoraConfig's field may say.
        values["init_lora_weights"] = bool(values.get("init_lora_weights", True))
        return cls(**{name: value for name, value in values.items() if name in ours})


def _checked_pattern(pattern: Any, init_r: int) -> dict[str, tuple[bool, ...]] | None:
    """Return the pattern by PEFT's keys in files; while it trains, they end with the adapter's name."""
    if pattern is None or pattern == {}:
        return None
    if not isinstance(pattern, Mapping):
        raise ConfigError(f"rank_pattern: expected a dict from 'path.lora_E' to a list, got {pattern!r}")
    found = {}
    for key, kept in pattern.items():
        path, separator, _ = str(key).rpartition(_E)
        if not separator or not path:
            raise ConfigError(f"rank_pattern: expected keys 'path.lora_E', got {key!r}")
        is_list = isinstance(kept, (list, tuple)) and all(isinstance(value, bool) for value in kept)
        if not is_list or len(kept) != init_r:
            got = f"{len(kept)} values" if is_list else repr(kept)
            raise ConfigError(
                f"rank_pattern[{key!r}]: expected init_r={init_r} times True or False, got {got}"
            )
        found[path + _E] = tuple(kept)
    return found


class AdaLoRAMethod(LinearMethod):
    """:class:`fastpeft.AdaLoRA` in the verbs."""

    config = AdaLoRA
    peft_type = "ADALORA"
    pefts_targets = "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING"

    def specs(self, model: nn.Module, config: AdaLoRA, targets: Mapping[str, nn.Module]) -> dict[str, Spec]:
        """The rank of every target, with one record of the ranks.

        Raises:
            PatchError: a target is no linear, or ``rank_pattern`` names what is no target.
        """
        for path, module in targets.items():
            if isinstance(module, nn.Embedding):
                raise PatchError(f"{path}: AdaLoRA is for linears, and this is {type(module).__name__}")
        pattern = {key.removesuffix(_E): kept for key, kept in (config.rank_pattern or {}).items()}
        if unknown := [path for path in pattern if path not in targets]:
            raise PatchError(
                f"rank_pattern: expected modules that get an adapter, got\n  {shown_lines(unknown)}"
            )
        ranks = Ranks(pattern, is_final=bool(pattern))
        return {
            path: AdaLoRASpec(
                r=config.rank_of(path),
                init_r=config.init_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                init_lora_weights=config.init_lora_weights,
                ranks=ranks,
            )
            for path in targets
        }

    def attach(self, model: nn.Module, config: AdaLoRA, name: str) -> None:
        """Let the model add the regulariser to its loss."""
        layers = [layer for _, layer in adapter_layers(model) if name in layer.specs]
        OrthogonalLoss(layers, name, config.orth_reg_weight).put_on(model)

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """A, E and B of every module."""
        return {
            f"{PREFIX}{path}.{kind}": getattr(layer, kind)[name]
            for path, layer in adapter_layers(model)
            if name in layer.specs
            for kind in layer.specs[name].kinds
        }

    def in_file(self, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the triplets that are masked."""
        found = dict(tensors)
        for path, kept in pattern_of(model, name).items():
            for kind, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
                whole = found[key := f"{PREFIX}{path}.{kind}"]
                if whole.shape[axis] != sum(kept):
                    places = torch.tensor([place for place, is_kept in enumerate(kept) if is_kept]).long()
                    found[key] = whole.index_select(axis, places)
        return found

    def content(self, model: nn.Module, config: AdaLoRA, name: str) -> dict[str, Any]:
        """PEFT's fields."""
        content = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        pattern = {path + _E: list(kept) for path, kept in pattern_of(model, name).items()}
        content.update(
            fan_in_fan_out=is_transposed(model, name),
            target_modules=target_names(model, name, config.modules_to_save),
            exclude_modules=None,
            layers_to_transform=None,
            rank_pattern=pattern or None,
        )
        return content

    def read(self, content: Mapping[str, Any]) -> AdaLoRA:
        """A ``peft.AdaLoraConfig``."""
        return AdaLoRA.from_peft(content)

    def translate(self, config: Any) -> AdaLoRA:
        """A ``peft.AdaLoraConfig``."""
        return AdaLoRA.from_peft(config)

    def check_file(self, path: Path, config: AdaLoRA, tensors: Mapping[str, Tensor]) -> None:
        """The ranks that the configuration declares are those of the file."""
        ranks = {
            key.removeprefix(PREFIX).removesuffix(_E): tensor.numel()
            for key, tensor in tensors.items()
            if key.endswith(_E)
        }
        if not ranks:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: holds no lora_E")
        lines = [
            f"{module}: declared r={config.rank_of(module)}, the file's lora_E has {found} rows"
            for module, found in ranks.items()
            if config.rank_of(module) != found
        ]
        lines += [
            f"{key}: in rank_pattern, not in the file"
            for key in config.rank_pattern or ()
            if key.removesuffix(_E) not in ranks
        ]
        if lines:
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} and {WEIGHTS_NAME} do not belong together:\n  " + shown_lines(lines)
            )

    def differences(self, model: nn.Module, name: str, config: AdaLoRA) -> Differences:
        """Rank and scaling of every module."""
        lines = []
        for path, layer in adapter_layers(model):
            if (spec := layer.specs.get(name)) is None:
                continue
            assert isinstance(spec, AdaLoRASpec)
            mine = (spec.r, spec.init_r, spec.lora_alpha)
            theirs = (config.rank_of(path), config.init_r, config.lora_alpha)
            if mine != theirs:
                shown = [f"r={r}, init_r={init_r}, lora_alpha={a:g}" for r, init_r, a in (mine, theirs)]
                lines.append(f"{path}: the model has {shown[0]}; the folder has {shown[1]}")
        return lines


def adalora_layers(model: nn.Module, name: str) -> dict[str, AdapterMixin]:
    """Return the layers with an AdaLoRA adapter of this name, by path."""
    return {
        path: layer for path, layer in adapter_layers(model) if isinstance(layer.specs.get(name), AdaLoRASpec)
    }


def ranks_of(layers: Sequence[AdapterMixin], name: str) -> Ranks:
    """Return the record that the layers of an adapter share."""
    spec = layers[0].specs[name]
    assert isinstance(spec, AdaLoRASpec)
    return spec.ranks


def pattern_of(model: nn.Module, name: str) -> Pattern:
    """Return which triplets an adapter has left, by module path; empty: all."""
    layers = adalora_layers(model, name)
    return ranks_of(list(layers.values()), name).pattern if layers else {}
