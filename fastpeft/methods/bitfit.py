"""BitFit (arXiv 2106.10199): the biases train, and nothing else.

    y = x W^T + b + Δb        dΔb = colsum(dY)

No gradient of W exists, so no linear keeps its input for backward, and nothing is added to the forward. The
biases train where they are; their values before are kept, so that ``unpatch`` gives them back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastpeft import fields
from fastpeft.errors import CheckpointError, PatchError
from fastpeft.folder_files import WEIGHTS_NAME
from fastpeft.layers.kinds import is_linear_like
from fastpeft.methods.method import Differences, Method, Plan
from fastpeft.patch_report import ModuleReport
from fastpeft.targets import left_out, listed, match_names, matches, repeated_blocks


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Train biases alone: of linears, norms and convolutions.

    Attributes:
        target_modules: names or dotted suffixes of modules whose bias trains; or one regular expression that
            must match a whole module path; or ``"all-linear"``; or None for every bias of the model. (The
            paper's small variant is the query projection and the MLP's first linear.)
        exclude_modules: names, suffixes or one regular expression, taken out of ``target_modules``.
        layers_to_transform: indices of the repeated blocks whose biases train; None means all of the model.
        modules_to_save: modules trained whole, such as a new head: every one whose path ends so.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fields.settle_selection(self)


class BitFitMethod(Method):
    """:class:`fastpeft.BitFit` in the verbs. PEFT has no such method; the files are like its own."""

    config = BitFit
    peft_type = "BITFIT"

    def plan(self, model: nn.Module, config: BitFit, name: str, *, allow_unmatched: bool) -> Plan:
        """The biases that the configuration means, in place.

        Raises:
            PatchError: there is none, or a name of ``target_modules`` has none.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        blocks = dict(repeated_blocks(model))
        biases = {n: p for n, p in model.named_parameters() if _is_bias(n, p)}
        if not biases:
            raise PatchError(f"BitFit trains biases, and {type(model).__name__} has none")
        owners = {name: name.rpartition(".")[0] for name in biases}
        chosen, reports = [], []
        for name, path in owners.items():
            if not _is_meant(config, path, modules[path]):
                continue
            detail = f"{name.rpartition('.')[2]} of {type(modules[path]).__name__}"
            if (reason := left_out(path, blocks, config)) is None:
                chosen.append(name)
                reports.append(ModuleReport(path, "trained", detail))
            elif reason != "in modules_to_save":  # which has a line of its own
                reports.append(ModuleReport(path, "skipped", f"{detail}: {reason}"))
        unmatched = _unmatched(config, set(owners.values()))
        if unmatched and not (allow_unmatched and chosen):
            ends = sorted({path.rpartition(".")[2] for path in owners.values()})
            raise PatchError(
                f"target_modules: no module with a bias matches {listed([repr(n) for n in unmatched])}; "
                f"those with one are named {listed(ends)}"
            )
        if not chosen:
            raise PatchError(f"no bias of {type(model).__name__} is left to train by {config}")
        return Plan(trained=tuple(chosen), reports=reports, unmatched=unmatched)

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """Nothing beside the base's own biases."""
        return {}

    def content(self, model: nn.Module, config: BitFit, name: str) -> dict[str, Any]:
        """The configuration."""
        return dataclasses.asdict(config)

    def read(self, content: Mapping[str, Any]) -> BitFit:
        """The configuration."""
        return fields.from_content(BitFit, content)

    def check_file(self, path: Path, config: BitFit, tensors: Mapping[str, Tensor]) -> None:
        """There is something in it."""
        if not tensors:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: holds no bias")

    def differences(self, model: nn.Module, name: str, config: BitFit) -> Differences:
        """None: which biases train shows in the tensors."""
        return []


def _is_bias(name: str, parameter: Tensor) -> bool:
    """``bias``, or ``in_proj_bias`` and the like of modules with several."""
    return name.endswith("bias") and parameter.dim() == 1 and parameter.is_floating_point()


def _is_meant(config: BitFit, path: str, module: nn.Module) -> bool:
    if config.target_modules is None:
        return True
    if config.target_modules == fields.ALL_LINEAR:
        return is_linear_like(module)
    return matches(config.target_modules, path)


def _unmatched(config: BitFit, paths: set[str]) -> tuple[str, ...]:
    selector = config.target_modules
    if isinstance(selector, str):
        found = selector == fields.ALL_LINEAR or any(matches(selector, path) for path in paths)
        return () if found else (selector,)
    return tuple(name for name in selector or () if not any(match_names((name,), path) for path in paths))
