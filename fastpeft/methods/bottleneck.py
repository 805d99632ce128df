"""Series adapters (Houlsby et al., arXiv 1902.00751) and parallel ones (He et al., arXiv 2110.04366).

    series     y = f(x) + s (act(f(x) D^T + d) U^T + u)
    parallel   y = f(x) + s (act(x D^T + d) U^T + u)

with f a part of a block, its MLP unless others are named, before the block's residual is added. The op is in
:mod:`fastpeft.ops.bottleneck`. PEFT has no such method; the files are like its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from fastpeft import fields
from fastpeft.errors import CheckpointError, PatchError
from fastpeft.folder_files import CONFIG_NAME, WEIGHTS_NAME
from fastpeft.layers.attached import attach, detach
from fastpeft.layers.bottleneck import CHILD, BottleneckAdapter
from fastpeft.layers.kinds import is_linear_like, shape_of
from fastpeft.methods.method import PREFIX, Differences, Method, Plan
from fastpeft.methods.mlps import find_mlps, width_of
from fastpeft.ops.bottleneck import NonLinearity
from fastpeft.patch_report import ModuleReport
from fastpeft.targets import left_out, listed, match_names, matches, repeated_blocks, shown_lines


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """What series and parallel adapters have in common.

    Attributes:
        bottleneck_size: features between the projections; IST's appendix has 256.
        non_linearity: ``"relu"``, ``"tanh"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
        scaling: the factor on what the adapter adds.
        target_modules: names or dotted suffixes of modules, or one regular expression that must match a whole
            path; a linear, or a part of a block, such as its attention. None for the blocks' MLPs.
        exclude_modules: names, suffixes or one regular expression, taken out of ``target_modules``.
        layers_to_transform: indices of the repeated blocks to patch; None means all.
        modules_to_save: modules trained whole and saved with the adapter: every one whose path ends so.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    bottleneck_size: int = 256
    non_linearity: NonLinearity = "tanh"
    scaling: float = 1.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    in_series: ClassVar[bool]

    def __post_init__(self) -> None:
        fields.check_count("bottleneck_size", self.bottleneck_size)
        fields.check_one_of("non_linearity", self.non_linearity, get_args(NonLinearity))
        fields.check_positive("scaling", self.scaling)
        fields.settle_selection(self)


@dataclass(frozen=True, kw_only=True)
class SeriesAdapter(Bottleneck):
    """An adapter behind each MLP: it takes the MLP's output and adds to it (arXiv 1902.00751).

    The fields are :class:`Bottleneck`'s.
    """

    in_series = True


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Bottleneck):
    """An adapter beside each MLP: it takes the MLP's input and adds to its output (arXiv 2110.04366).

    The fields are :class:`Bottleneck`'s; the paper's own has ``non_linearity="relu"`` and ``scaling=4``.
    """

    in_series = False


class BottleneckMethod(Method):
    """:class:`fastpeft.SeriesAdapter` or :class:`fastpeft.ParallelAdapter` in the verbs.

    Args:
        config: which of the two.
    """

    config: type[Bottleneck]

    def __init__(self, config: type[Bottleneck]) -> None:
        self.config = config
        self.peft_type = "SERIES_ADAPTER" if config.in_series else "PARALLEL_ADAPTER"

    def plan(self, model: nn.Module, config: Bottleneck, name: str, *, allow_unmatched: bool) -> Plan:
        """An adapter on the output of every module that is meant.

        Raises:
            PatchError: there is none, or one of them cannot carry an adapter.
        """
        blocks = dict(repeated_blocks(model))
        paths, unmatched = _targets(model, config, allow_unmatched=allow_unmatched)
        adapters: dict[str, BottleneckAdapter] = {}
        reports = []
        for path in paths:
            if (reason := left_out(path, blocks, config)) is None:
                adapters[path] = adapter = _adapter(model, path, blocks, config)
                reports.append(ModuleReport(path, "patched", adapter.extra_repr()))
            elif reason != "in modules_to_save":  # which has a line of its own
                reports.append(ModuleReport(path, "skipped", reason))
        if not adapters:
            raise PatchError(f"nothing of {type(model).__name__} is left to adapt by {config}")

        def finish() -> None:
            for path, adapter in adapters.items():
                attach(model.get_submodule(path), adapter.train(model.training))

        return Plan(reports=reports, unmatched=unmatched, finish=finish)

    def detach(self, model: nn.Module) -> None:
        """Take the adapters off."""
        for path, _ in list(bottleneck_adapters(model)):
            detach(model.get_submodule(path), CHILD)

    def switches(self, model: nn.Module) -> list[Any]:
        """The adapters."""
        return [adapter for _, adapter in bottleneck_adapters(model)]

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The two projections and biases of every module."""
        return {
            f"{PREFIX}{path}.{CHILD}.{key}": parameter
            for path, adapter in bottleneck_adapters(model)
            for key, parameter in adapter.named_parameters()
        }

    def content(self, model: nn.Module, config: Bottleneck, name: str) -> dict[str, Any]:
        """The configuration, with the modules written out."""
        paths = [path for path, _ in bottleneck_adapters(model)]
        return {
            **dataclasses.asdict(config),
            "target_modules": paths,
            "exclude_modules": None,
            "layers_to_transform": None,
        }

    def read(self, content: Mapping[str, Any]) -> Bottleneck:
        """The configuration."""
        return fields.from_content(self.config, content)

    def check_file(self, path: Path, config: Bottleneck, tensors: Mapping[str, Tensor]) -> None:
        """The size that the configuration declares is the file's."""
        sizes = {key: t.shape[0] for key, t in tensors.items() if key.endswith(f"{CHILD}.down_bias")}
        if not sizes:
            raise CheckpointError(f"{path / WEIGHTS_NAME}: holds no {CHILD}")
        declared = config.bottleneck_size
        if wrong := [f"{key}: declared {declared}, got {n}" for key, n in sizes.items() if n != declared]:
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} and {WEIGHTS_NAME} do not belong together:\n  " + shown_lines(wrong)
            )

    def differences(self, model: nn.Module, name: str, config: Bottleneck) -> Differences:
        """Scaling and non-linearity; sizes show in the tensors."""
        _, adapter = next(bottleneck_adapters(model))
        return [
            f"{what}: the model has {getattr(adapter, what)!r}, the folder {getattr(config, what)!r}"
            for what in ("non_linearity", "scaling")
            if getattr(adapter, what) != getattr(config, what)
        ]


def bottleneck_adapters(model: nn.Module) -> Iterator[tuple[str, BottleneckAdapter]]:
    """Yield (path of the module it is on, adapter), in the model's order."""
    for path, module in model.named_modules():
        adapter = module._modules.get(CHILD)
        if isinstance(adapter, BottleneckAdapter):
            yield path, adapter


def _targets(
    model: nn.Module, config: Bottleneck, *, allow_unmatched: bool
) -> tuple[list[str], tuple[str, ...]]:
    """Return the modules' paths, and the entries of ``target_modules`` that match none."""
    selector = config.target_modules
    if selector is None:
        found = list(find_mlps(model))
        if not found:
            raise PatchError(
                f"no MLP was found in the blocks of {type(model).__name__}; "
                "name the modules with target_modules"
            )
        if not config.in_series and (apart := [mlp.path for mlp in found if not mlp.is_whole]):
            raise PatchError(
                f"{apart[0]}: its block has no module for the whole MLP, whose input a parallel adapter "
                "takes; name modules with target_modules, or use fastpeft.SeriesAdapter"
            )
        return [mlp.path for mlp in found], ()
    modules = [path for path, _ in model.named_modules() if path]
    paths = [path for path in modules if matches(selector, path)]
    names = (selector,) if isinstance(selector, str) else selector
    unmatched = tuple(
        n for n in names if not (paths if n == selector else [p for p in modules if match_names((n,), p)])
    )
    if unmatched and not (allow_unmatched and paths):
        ends = sorted({path.rpartition(".")[2] for path in modules})
        raise PatchError(
            f"target_modules: no module of the model matches {listed([repr(n) for n in unmatched])}; "
            f"its modules are named {listed(ends)}"
        )
    return paths, unmatched


def _adapter(model: nn.Module, path: str, blocks: Mapping[str, int], config: Bottleneck) -> BottleneckAdapter:
    module = model.get_submodule(path)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Embedding)) or hasattr(module, CHILD):
        raise PatchError(f"{path}: a {type(module).__name__} cannot carry an adapter")
    block = next((block for block in blocks if path.startswith(f"{block}.")), None)
    if is_linear_like(module):
        inside, outside = shape_of(module)
    elif block is not None and (width := width_of(model.get_submodule(block))) is not None:
        inside = outside = width
    else:
        raise PatchError(f"{path}: expected a linear, or a module inside one of the repeated blocks")
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    like = next(p for p in model.parameters() if p.is_floating_point()) if like is None else like
    return BottleneckAdapter(
        outside if config.in_series else inside,
        outside,
        config.bottleneck_size,
        non_linearity=config.non_linearity,
        scaling=config.scaling,
        in_series=config.in_series,
        dtype=torch.float64 if like.dtype is torch.float64 else torch.float32,
        device=like.device,
    )
