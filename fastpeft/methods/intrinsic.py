"""Intrinsic dimension: training in a random subspace of d dimensions.

    theta = theta_0 + P theta_d                    Li et al. 2018, arXiv 1804.08838
    theta_i = theta_0,i + lambda_i P_i theta_d     with a scale for each module (SAID),
                                                   Aghajanyan et al. 2020, arXiv 2012.13255

The projection is in :mod:`fastpeft.ops.subspace`, what layers compute in :mod:`fastpeft.ops.subspace_linear`,
:mod:`fastpeft.ops.subspace_embedding` and :mod:`fastpeft.ops.subspace_weight`.
PEFT has no such method; the files are like its own, and hold d numbers: P follows from the seed. How d is
measured: :mod:`fastpeft.intrinsic`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastpeft import fields
from fastpeft.errors import CheckpointError, PatchError
from fastpeft.folder_files import CONFIG_NAME, WEIGHTS_NAME
from fastpeft.layers.kinds import is_linear_like, is_quantised
from fastpeft.layers.subspace import CHILD, Slot, Subspace, move, move_back, slot_of
from fastpeft.methods.method import PREFIX, Differences, Method, Plan
from fastpeft.ops.subspace import Projection, tables
from fastpeft.patch_report import ModuleReport
from fastpeft.sharding import is_sharded
from fastpeft.targets import left_out, listed, match_names, matches, repeated_blocks

Kind = Literal["fastfood", "hashed"]
_THETA, _LAMBDAS = f"{PREFIX}{CHILD}.theta_d", f"{PREFIX}{CHILD}.lambdas"
_MOST = 2**31  # parameters and blocks are counted in int32


@dataclass(frozen=True, kw_only=True)
class IntrinsicDimension:
    """Train ``theta_0 + P theta_d``: d numbers move every parameter of the model.

    theta_d begins at 0, so the model begins as its base. It is kept in fp32 over a 16-bit base, in which a
    step of it may round to nothing: W is rounded after the sum.

    Every forward computes W anew, and every backward: for inference call :func:`fastpeft.merge`, after which
    the model costs what its base costs. ``torch.compile`` takes the ops whole. Under FSDP2 the whole model
    must be a group too (``fully_shard(model)``), which keeps theta_d whole during forward and backward.

    Attributes:
        d: how many numbers train; with ``structure_aware`` the modules' scales are among them.
        projection: ``"fastfood"``, a structured stand-in for a dense normal P, or ``"hashed"``, where each
            parameter takes one coordinate: cheaper, and with exactly orthonormal columns.
        structure_aware: learn a scale for every module too (SAID), m of the d numbers.
        seed: of P.
        target_modules: names or dotted suffixes of modules whose own parameters move; or one regular
            expression that must match a whole module path; or ``"all-linear"``; or None for every
            floating-point parameter of the model, as in the papers: embeddings, norms and biases too.
        exclude_modules: names, suffixes or one regular expression, taken out of ``target_modules``.
        layers_to_transform: indices of the repeated blocks whose parameters move; None means all of the
            model.
        modules_to_save: modules trained whole beside the subspace, such as a new head: every one whose path
            ends so.
        layout: what P is of, ``"parameters:tensors:digest of their shapes"``. Files hold it, and a model with
            other parameters is refused; None asks nothing.

    Raises:
        ConfigError: a value cannot work; the message names the field, what was expected and what came.
    """

    d: int
    projection: Kind = "fastfood"
    structure_aware: bool = False
    seed: int = 0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layout: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        fields.check_count("d", self.d)
        fields.check_one_of("projection", self.projection, get_args(Kind))
        fields.check_flag("structure_aware", self.structure_aware)
        fields.check_count("seed", self.seed, least=0)
        fields.settle_selection(self)


class IntrinsicDimensionMethod(Method):
    """:class:`fastpeft.IntrinsicDimension` in the verbs."""

    config = IntrinsicDimension
    peft_type = "INTRINSIC_DIMENSION"
    merges_whole = True

    def plan(self, model: nn.Module, config: IntrinsicDimension, name: str, *, allow_unmatched: bool) -> Plan:
        """Every module whose own parameters are meant computes with the sum.

        Raises:
            PatchError: there is none, a name of ``target_modules`` means none, d is too small for the
                modules' scales, or the parameters are not those that ``layout`` says.
        """
        owners, reports, unmatched = _owners(model, config, allow_unmatched=allow_unmatched)
        parameters = {id(p): p for _, module, names in owners for p in (module._parameters[n] for n in names)}
        numels = [p.numel() for p in parameters.values() if p is not None]
        layout = _layout(list(parameters.values()))
        if config.layout not in (None, layout):
            raise PatchError(
                f"layout: P is of {config.layout}, the model has {layout} (parameters:tensors:shapes)"
            )
        scales, scale_of = _scales(owners)
        scales = scales if config.structure_aware else 0
        if config.d <= scales:
            raise PatchError(
                f"d: expected more than the {scales} scales of modules that are a part of it, got {config.d}"
            )
        total = sum(numels)
        if total >= _MOST:
            raise PatchError(f"P is of fewer than 2^31 parameters, and {total:,} are meant; leave some out")
        like = next(p for p in parameters.values() if p is not None)
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        projection = Projection(
            config.projection == "fastfood", config.d - scales, config.seed % 2**32, total
        )
        made = tables(projection, numels, dtype)
        first, at = {}, 0
        for key, numel in zip(parameters, numels, strict=True):
            first[key] = at
            at += projection.blocks(numel)

        def finish() -> None:
            subspace = Subspace(projection, scales, made, dtype=dtype, device=like.device)
            model.add_module(CHILD, subspace)
            for _, module, names in owners:
                own = {n: id(module._parameters[n]) for n in names}
                slot = Slot(
                    [subspace],
                    {n: scale_of[key] for n, key in own.items()},
                    {n: first[key] for n, key in own.items()},
                )
                move(module, slot)

        return Plan(reports=reports, unmatched=unmatched, finish=finish)

    def detach(self, model: nn.Module) -> None:
        """Give modules their classes back, out of a merge too.

        Raises:
            PatchError: the model was merged without keeping its base; nothing is changed.
        """
        if self.is_merged(model, ""):
            self.unmerge(model)
        for _, module, _ in list(_moved(model)):
            move_back(module)
        model._modules.pop(CHILD, None)

    def switches(self, model: nn.Module) -> list[Any]:
        """The subspace.

        Raises:
            PatchError: the model is merged.
        """
        if self.is_merged(model, ""):
            raise PatchError("disable_adapters: the model is merged; call fastpeft.unmerge(model) first")
        return [model._modules[CHILD]]

    def is_merged(self, model: nn.Module, name: str) -> bool:
        """Whether the Parameters hold ``theta_0 + P theta_d``; the adapter has no name."""
        return any(slot.is_merged for _, _, slot in _moved(model))

    @torch.no_grad()
    def merge(self, model: nn.Module, *, keep_base: bool) -> None:
        """Write ``theta_0 + P theta_d`` into the Parameters: what training computed with, to the bit."""
        moved = list(_moved(model))
        if any(slot.is_merged for _, _, slot in moved):
            raise PatchError("merge: the model is merged; call fastpeft.unmerge(model) first")
        if is_sharded(model.parameters()):
            raise PatchError("merge: the parameters are sharded (FSDP2); save, and merge in one process")
        seen: set[int] = set()
        done: list[tuple[Slot, str, Tensor]] = []
        for path, module, slot in moved:
            for name in slot.first:
                parameter = module._parameters[name]
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                merged = slot.added(name, parameter)
                if not merged.isfinite().all():
                    for other, key, changed in done:
                        changed.copy_(other.base.pop(key))
                    raise PatchError(f"merge: the merged {name} of {path} is not finite; nothing was merged")
                slot.base[name] = parameter.detach().to("cpu", copy=True)
                parameter.copy_(merged)
                done.append((slot, name, parameter))
        for _, _, slot in moved:
            slot.is_merged = True
            if not keep_base:
                slot.base.clear()

    @torch.no_grad()
    def unmerge(self, model: nn.Module) -> None:
        """Give the base weights back, to the bit."""
        moved = list(_moved(model))
        if not any(slot.is_merged for _, _, slot in moved):
            raise PatchError("unmerge: nothing is merged")
        if not any(slot.base for _, _, slot in moved):
            raise PatchError("unmerge: the model was merged with keep_base=False, its base weights are gone")
        for _, module, slot in moved:
            for name, base in slot.base.items():
                parameter = module._parameters[name]
                assert parameter is not None
                parameter.copy_(base)
            slot.base.clear()
            slot.is_merged = False

    def tensors(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """theta_d, and the scales where there are some."""
        subspace: Any = model._modules[CHILD]
        found = {_THETA: subspace.theta_d}
        return found if subspace.lambdas is None else {**found, _LAMBDAS: subspace.lambdas}

    def content(self, model: nn.Module, config: IntrinsicDimension, name: str) -> dict[str, Any]:
        """The configuration, and what P is of."""
        return {**dataclasses.asdict(config), "layout": _model_layout(model)}

    def read(self, content: Mapping[str, Any]) -> IntrinsicDimension:
        """The configuration."""
        return fields.from_content(IntrinsicDimension, content)

    def check_file(self, path: Path, config: IntrinsicDimension, tensors: Mapping[str, Tensor]) -> None:
        """There are as many numbers as the configuration says."""
        if _THETA not in tensors or (_LAMBDAS in tensors) != config.structure_aware:
            wanted = "theta_d and lambdas" if config.structure_aware else "theta_d alone"
            raise CheckpointError(f"{path / WEIGHTS_NAME}: expected {wanted}, got {listed(list(tensors))}")
        held = sum(tensors[key].numel() for key in (_THETA, _LAMBDAS) if key in tensors)
        if held != config.d:
            raise CheckpointError(
                f"{path}: {CONFIG_NAME} declares d={config.d}, {WEIGHTS_NAME} holds {held} numbers"
            )

    def differences(self, model: nn.Module, name: str, config: IntrinsicDimension) -> Differences:
        """What makes P another one."""
        subspace: Any = model._modules[CHILD]
        projection: Projection = subspace.projection
        ours = {
            "d": projection.d + (0 if subspace.lambdas is None else len(subspace.lambdas)),
            "projection": "fastfood" if projection.is_fastfood else "hashed",
            "structure_aware": subspace.lambdas is not None,
            "seed": projection.seed,
            "layout": _model_layout(model),
        }
        theirs = {**{key: getattr(config, key) for key in ours}, "seed": config.seed % 2**32}
        return [
            f"{key}: the model has {ours[key]!r}, the folder {theirs[key]!r}"
            for key in ours
            if ours[key] != theirs[key] and theirs[key] is not None
        ]


Owner = tuple[str, nn.Module, list[str]]


def _owners(
    model: nn.Module, config: IntrinsicDimension, *, allow_unmatched: bool
) -> tuple[list[Owner], list[ModuleReport], tuple[str, ...]]:
    """Return the modules that are meant with their parameters' names, reports, entries without match."""
    blocks = dict(repeated_blocks(model))
    owners: list[Owner] = []
    reports: list[ModuleReport] = []
    with_parameters: list[str] = []
    for path, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if p is not None}
        if not own:
            continue
        with_parameters.append(path)
        if not _is_meant(config, path, module):
            continue
        kind = type(module).__name__
        names = [n for n, p in own.items() if not is_quantised(p) and p.element_size() > 1 and p.numel()]
        reason = left_out(path, blocks, config)
        if isinstance(module, nn.RNNBase):
            reason = reason or "keeps its weights in a list of its own"
        elif not names:
            reason = reason or f"its parameters are {next(iter(own.values())).dtype}"
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            reason = reason or "max_norm writes to its weight"
        if reason is None:
            owners.append((path, module, names))
            detail = f"{', '.join(names)} of {kind}"
            reports.append(ModuleReport(path, "patched", detail))
        elif reason != "in modules_to_save":  # which has a line of its own
            reports.append(ModuleReport(path, "skipped", f"{kind}: {reason}"))
    unmatched = _unmatched(config, with_parameters)
    if unmatched and not (allow_unmatched and owners):
        ends = sorted({path.rpartition(".")[2] for path in with_parameters})
        raise PatchError(
            f"target_modules: no module with parameters matches {listed([repr(n) for n in unmatched])}; "
            f"those with some are named {listed(ends)}"
        )
    if not owners:
        raise PatchError(f"no parameter of {type(model).__name__} is left to move by {config}")
    return owners, reports, unmatched


def _is_meant(config: IntrinsicDimension, path: str, module: nn.Module) -> bool:
    if config.target_modules is None:
        return True
    if config.target_modules == fields.ALL_LINEAR:
        return is_linear_like(module)
    return matches(config.target_modules, path)


def _unmatched(config: IntrinsicDimension, paths: list[str]) -> tuple[str, ...]:
    selector = config.target_modules
    if isinstance(selector, str):
        found = selector == fields.ALL_LINEAR or any(matches(selector, path) for path in paths)
        return () if found else (selector,)
    return tuple(name for name in selector or () if not any(match_names((name,), path) for path in paths))


def _scales(owners: list[Owner]) -> tuple[int, dict[int, int]]:
    """Return how many scales there are, and each parameter's: that of its first owner."""
    scale_of: dict[int, int] = {}
    count = 0
    for _, module, names in owners:
        fresh = [id(module._parameters[n]) for n in names if id(module._parameters[n]) not in scale_of]
        scale_of.update(dict.fromkeys(fresh, count))
        count += bool(fresh)
    return count, scale_of


def _moved(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    for path, module in model.named_modules():
        if (slot := slot_of(module)) is not None:
            yield path, module, slot


def _model_layout(model: nn.Module) -> str:
    found = {id(p): p for _, m, slot in _moved(model) for p in (m._parameters[n] for n in slot.first)}
    return _layout(list(found.values()))


def _layout(parameters: list[Any]) -> str:
    shapes = ";".join("x".join(map(str, p.shape)) for p in parameters)
    digest = hashlib.sha256(shapes.encode()).hexdigest()[:12]
    return f"{sum(p.numel() for p in parameters)}:{len(parameters)}:{digest}"
