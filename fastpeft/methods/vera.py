"""VeRA (arXiv 2310.11454): random matrices that all layers share, and two trained vectors for each layer.

The formula is in :mod:`fastpeft.layers.vera`, the files are PEFT's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from fastpeft import fields
from fastpeft.errors import CheckpointError, ConfigError, PatchError
from fastpeft.folder_files import CONFIG_NAME, WEIGHTS_NAME
from fastpeft.layers.adapter import Spec
from fastpeft.layers.kinds import shape_of
from fastpeft.layers.vera import Projections, VeRASpec
from fastpeft.methods.linears import LinearMethod, adapter_layers, is_transposed, target_names
from fastpeft.methods.method import PREFIX, Differences
from fastpeft.targets import shown_lines

Bias = Literal["none", "all", "vera_only"]
_PAIR = ("vera_A", "vera_B")
_ROOT = "base_model."  # where files hold the pair
_VECTOR = ".vera_lambda_d"


@dataclass(frozen=True, kw_only=True)
class VeRA:
    """VeRA on chosen linear layers. Names, meanings and defaults are those of ``peft.VeraConfig``.

    Attributes:
        r: rank; far above LoRA's, for it costs r numbers a layer.
        target_modules: as in :class:`fastpeft.LoRA`.
        exclude_modules: names, suffixes or one regular expression, taken out of ``target_modules``.
        projection_prng_key: seeds the shared matrices.
        save_projection: whether files hold the shared matrices too, or the key alone, of which they are drawn
            again: the same on every machine with the same torch generator.
        vera_dropout: probability of zeroing an element of the adapter's input during training.
        d_initial: what d starts with; the paper's Table 6c wants at most 0.1.
        init_weights: False starts with b = 1 and a random d, so that the update is not zero.
        bias: which biases of the base train: ``"none"``, ``"all"``, or ``"vera_only"`` (of patched modules).
        modules_to_save: modules trained whole and saved with the adapter: every one whose path ends so.
        layers_to_transform: indices of the repeated blocks to patch; None means all.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    r: int = 256
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    bias: Bias = "none"
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        fields.check_count("r", self.r)
        fields.check_count("projection_prng_key", self.projection_prng_key, least=0)
        fields.check_probability("vera_dropout", self.vera_dropout)
        fields.check_positive("d_initial", self.d_initial)
        fields.check_one_of("bias", self.bias, get_args(Bias))
        for name in ("save_projection", "init_weights"):
            fields.check_flag(name, getattr(self, name))
        fields.settle_selection(self)

    @classmethod
    def from_peft(cls, config: Any) -> VeRA:
        """Return the VeRA that a ``peft.VeraConfig`` (or its ``to_dict()``) describes.

        Raises:
            ConfigError: it is not a VeRA configuration, or it sets fields that fastpeft does not honour.
        """
        kind, values = fields.read_peft(config)
        if kind != "VERA":
            raise ConfigError(f"expected a peft.VeraConfig (peft_type VERA), got peft_type {kind!r}")
        ours = {f.name for f in dataclasses.fields(cls)}
        if unsupported := fields.not_honoured(values, ours):
            raise ConfigError(f"peft.VeraConfig sets what fastpeft does not honour: {', '.join(unsupported)}")
        values["modules_to_save"] = fields.trained_heads(values)
        return cls(**{name: value for name, value in values.items() if name in ours})


class VeRAMethod(LinearMethod):
    """:class:`fastpeft.VeRA` in the verbs."""

    config = VeRA
    peft_type = "VERA"
    pefts_targets = "TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING"

    def specs(self, model: nn.Module, config: VeRA, targets: Mapping[str, nn.Module]) -> dict[str, Spec]:
        """The same for every target, with one pair of matrices.

        Raises:
            PatchError: a target is no linear.
        """
        for path, module in targets.items():
            if isinstance(module, nn.Embedding):
                raise PatchError(f"{path}: VeRA is for linears, and this is {type(module).__name__}")
        shapes = [shape_of(module) for module in targets.values()]
        pair = Projections(
            config.r,
            max(in_features for in_features, _ in shapes),
            max(out_features for _, out_features in shapes),
            key=config.projection_prng_key,
            is_saved=config.save_projection,
        )
        spec = VeRASpec(
            r=config.r,
            vera_dropout=config.vera_dropout,
            d_initial=config.d_initial,
            init_weights=config.init_weights,
            projections=pair,
        )
        return dict.fromkeys(targets, spec)

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """b and d of every module, and the shared pair where it is saved."""
        found: dict[str, Tensor] = {}
        pair: Projections | None = None
        for path, layer in adapter_layers(model):
            if name in layer.specs:
                for kind in layer.specs[name].kinds:
                    found[f"{PREFIX}{path}.{kind}"] = getattr(layer, kind)[name]
                pair = layer.vera_projections[name]  # type: ignore[index, assignment]
        if pair is not None and pair.is_saved:
            found.update({f"{_ROOT}{matrix}": getattr(pair, matrix) for matrix in _PAIR})
        return found

    def content(self, model: nn.Module, config: VeRA, name: str) -> dict[str, Any]:
        """PEFT's fields."""
        content = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        del content["exclude_modules"]  # no field of PEFT's, and the names that follow leave them out
        content.update(
            fan_in_fan_out=is_transposed(model, name),
            target_modules=target_names(model, name, config.modules_to_save),
            layers_to_transform=None,
        )
        return content

    def read(self, content: Mapping[str, Any]) -> VeRA:
        """A ``peft.VeraConfig``."""
        return VeRA.from_peft(content)

    def translate(self, config: Any) -> VeRA:
        """A ``peft.VeraConfig``."""
        return VeRA.from_peft(config)

    def check_file(self, path: Path, config: VeRA, tensors: Mapping[str, Tensor]) -> None:
        """The rank that the configuration declares is the file's."""
        ranks = {key: t.numel() for key, t in tensors.items() if key.endswith(_VECTOR)}
        if not ranks:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: holds no vera_lambda_d")
        wrong = [
            f"{key}: declared r={config.r}, got {r} numbers" for key, r in ranks.items() if r != config.r
        ]
        if wrong:
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} and {WEIGHTS_NAME} do not belong together:\n  " + shown_lines(wrong)
            )

    def differences(self, model: nn.Module, name: str, config: VeRA) -> Differences:
        """The rank and, where files do not hold the shared matrices, the key that they are drawn of."""
        lines = []
        for _, layer in adapter_layers(model):
            if (spec := layer.specs.get(name)) is None:
                continue
            pair: Projections = layer.vera_projections[name]  # type: ignore[index, assignment]
            for what, ours, theirs in (
                ("r", spec.r, config.r),
                ("save_projection", pair.is_saved, config.save_projection),
                ("projection_prng_key", pair.key, config.projection_prng_key),
            ):
                if ours != theirs and not (what == "projection_prng_key" and config.save_projection):
                    lines.append(f"{what}: the model has {ours}, the folder {theirs}")
            break  # they are the same in every layer
        return lines
