"""LN-LoRA: LoRA with a LayerNorm between its matrices, ``y = W x + s B LN(A x)``.

The formula and its sources are in :mod:`fastpeft.ops.ln_lora`. PEFT has no such method, and LoRA's readers
would leave the norm out: the files have a type of their own, which they refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastpeft import fields
from fastpeft.errors import CheckpointError, PatchError
from fastpeft.folder_files import CONFIG_NAME, WEIGHTS_NAME
from fastpeft.layers.adapter import adapter_dtype
from fastpeft.layers.attached import attach, detach
from fastpeft.layers.kinds import shape_of
from fastpeft.layers.ln_lora import CHILD, LNLoRAAdapter
from fastpeft.methods.method import PREFIX, Differences, Method, Plan
from fastpeft.patch_report import ModuleReport
from fastpeft.targets import select, shown_lines, trains_whole


@dataclass(frozen=True, kw_only=True)
class LNLoRA:
    """LoRA with a LayerNorm within: ``y = W x + (lora_alpha / r) B LN(A x)``, LN's gain and bias trained.

    The names are LoRA's. It cannot be merged: the update is not linear in x.

    Attributes:
        r: rank of A and B, at least 2: the norm of a single feature is zero.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: probability of zeroing an element of the adapter's input during training.
        target_modules: as in :class:`fastpeft.LoRA`; linears only.
        exclude_modules: names, suffixes or one regular expression, taken out of ``target_modules``.
        modules_to_save: modules trained whole and saved with the adapter: every one whose path ends so.
        layers_to_transform: indices of the repeated blocks to patch; None means all.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        fields.check_count("r", self.r, least=2)
        fields.check_positive("lora_alpha", self.lora_alpha)
        fields.check_probability("lora_dropout", self.lora_dropout)
        fields.settle_selection(self)

    @property
    def scaling(self) -> float:
        """The factor on what is added."""
        return self.lora_alpha / self.r


class LNLoRAMethod(Method):
    """:class:`fastpeft.LNLoRA` in the verbs."""

    config = LNLoRA
    peft_type = "LN_LORA"

    def plan(self, model: nn.Module, config: LNLoRA, name: str, *, allow_unmatched: bool) -> Plan:
        """An adapter beside every linear that is meant; a linear under several paths has one.

        Raises:
            PatchError: a target matches nothing, or is no linear.
        """
        selection = select(model, config, allow_unmatched=allow_unmatched)
        for path, module in selection.targets.items():
            if isinstance(module, nn.Embedding):
                raise PatchError(f"{path}: LN-LoRA is for linears, and this is {type(module).__name__}")
        adapters: dict[nn.Module, LNLoRAAdapter] = {}
        reports = []
        for path, module in selection.targets.items():
            if module not in adapters:
                adapters[module] = _adapter(module, config)
            reports.append(ModuleReport(path, "patched", adapters[module].extra_repr()))
        reports += [
            ModuleReport(path, "skipped", reason)
            for path, reason in selection.skipped.items()
            if not trains_whole(path, config)  # which has a line of its own
        ]

        def finish() -> None:
            for module, adapter in adapters.items():
                attach(module, adapter.train(module.training))

        return Plan(reports=reports, unmatched=selection.unmatched, finish=finish)

    def detach(self, model: nn.Module) -> None:
        """Take the adapters off."""
        for path, _ in list(ln_lora_adapters(model)):
            detach(model.get_submodule(path), CHILD)

    def switches(self, model: nn.Module) -> list[Any]:
        """The adapters."""
        return [adapter for _, adapter in ln_lora_adapters(model)]

    def why_not(self, verb: str) -> str:
        """A merge is impossible, not merely missing."""
        if verb == "merge":
            return "LN-LoRA's update B LN(A x) is not linear in x, so no weight can hold it"
        return super().why_not(verb)

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """A, B and the norm of every linear."""
        return {
            f"{PREFIX}{path}.{CHILD}.{key}": parameter
            for path, adapter in ln_lora_adapters(model)
            for key, parameter in adapter.named_parameters()
        }

    def content(self, model: nn.Module, config: LNLoRA, name: str) -> dict[str, Any]:
        """The configuration, with the modules written out."""
        return {
            **dataclasses.asdict(config),
            "target_modules": [path for path, _ in ln_lora_adapters(model)],
            "exclude_modules": None,
            "layers_to_transform": None,
        }

    def read(self, content: Mapping[str, Any]) -> LNLoRA:
        """The configuration."""
        return fields.from_content(LNLoRA, content)

    def check_file(self, path: Path, config: LNLoRA, tensors: Mapping[str, Tensor]) -> None:
        """The rank that the configuration declares is the file's."""
        ranks = {key: t.shape[0] for key, t in tensors.items() if key.endswith(f"{CHILD}.lora_A")}
        if not ranks:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: holds no {CHILD}")
        if wrong := [f"{key}: declared r={config.r}, got {r}" for key, r in ranks.items() if r != config.r]:
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} and {WEIGHTS_NAME} do not belong together:\n  " + shown_lines(wrong)
            )

    def differences(self, model: nn.Module, name: str, config: LNLoRA) -> Differences:
        """The scaling; ranks show in the tensors."""
        _, adapter = next(ln_lora_adapters(model))
        if adapter.scaling == config.scaling:
            return []
        return [f"scaling: the model has {adapter.scaling:g}, the folder {config.scaling:g}"]


def ln_lora_adapters(model: nn.Module) -> Iterator[tuple[str, LNLoRAAdapter]]:
    """Yield (path of the linear it is on, adapter), in the model's order."""
    for path, module in model.named_modules():
        adapter = module._modules.get(CHILD)
        if isinstance(adapter, LNLoRAAdapter):
            yield path, adapter


def _adapter(linear: nn.Module, config: LNLoRA) -> LNLoRAAdapter:
    inside, outside = shape_of(linear)
    weight: Any = linear.weight
    return LNLoRAAdapter(
        inside,
        outside,
        config.r,
        scaling=config.scaling,
        lora_dropout=config.lora_dropout,
        dtype=adapter_dtype(weight),
        device=weight.device,
    )
