"""Adapters inside linears and embeddings: modules with adapters take the place of the plain ones."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fastpeft.blocks.install import fuse_blocks, release_blocks
from fastpeft.errors import PatchError
from fastpeft.layers.adalora import hooks_of
from fastpeft.layers.adapter import AdapterMixin, Spec
from fastpeft.layers.kinds import adapter_class, is_conv1d_like
from fastpeft.methods.method import Method, Plan
from fastpeft.patch_report import ModuleReport
from fastpeft.targets import Selection, listed, match_names, select, trains_whole


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterMixin]]:
    """Yield (path, module) of every layer with adapters, each once, in the model's order."""
    return ((path, m) for path, m in model.named_modules() if isinstance(m, AdapterMixin))


class LinearMethod(Method):
    """A method whose adapters are in linears, side by side by name."""

    has_names = True

    @abstractmethod
    def specs(self, model: nn.Module, config: Any, targets: Mapping[str, nn.Module]) -> dict[str, Spec]:
        """Return every target's share of a configuration, by path.

        Raises:
            PatchError: a target cannot have such an adapter.
        """

    def plan(self, model: nn.Module, config: Any, name: str, *, allow_unmatched: bool) -> Plan:
        """Linears with the adapter in the place of those that ``config`` targets."""
        selection = select(model, config, allow_unmatched=allow_unmatched)
        layers = build_layers(selection.targets, self.specs(model, config, selection.targets), name)
        for layer in layers.values():
            layer.active_adapters = (name,)

        def finish() -> None:
            for layer in dict.fromkeys(layers.values()):
                layer.rewrite_base(name)
            fuse_blocks(model)
            self.attach(model, config, name)

        return Plan(
            replacements=dict(layers),
            trained=tuple(_trained_biases(model, config, selection.targets)),
            reports=list(_reports(model, config, selection, layers)),
            unmatched=selection.unmatched,
            finish=finish,
        )

    def switches(self, model: nn.Module) -> list[Any]:
        """The layers."""
        return [layer for _, layer in adapter_layers(model)]

    def is_merged(self, model: nn.Module, name: str) -> bool:
        """Whether it is so in any layer."""
        return any(name in layer.merged_adapters for _, layer in adapter_layers(model))

    def detach(self, model: nn.Module) -> None:
        """Give the base weights back: out of a merge, and whole again.

        Raises:
            PatchError: a base weight is gone, in a merge that kept none; nothing is changed.
        """
        layers = list(adapter_layers(model))
        for path, layer in layers:
            if layer.merged_adapters and layer._unmerged is None:
                raise PatchError(f"unpatch: {path} was merged with keep_base=False, its base weight is gone")
        for _, layer in layers:
            if layer.merged_adapters:
                layer.unmerge()
            layer.restore_base()
        release_blocks(model)
        for hook in hooks_of(model):
            hook.take_off()


def build_layers(
    targets: Mapping[str, nn.Module], specs: Mapping[str, Spec], name: str
) -> dict[str, AdapterMixin]:
    """Return the replacement of every target, with the adapter; one that several paths share is made once.

    Raises:
        PatchError: an adapter cannot start from a target's weight.
    """
    by_identity: dict[int, AdapterMixin] = {}
    replacements: dict[str, AdapterMixin] = {}
    for path, module in targets.items():
        if id(module) not in by_identity:
            kind = adapter_class(module)
            assert kind is not None, path  # select() has checked it
            layer = kind.__new__(kind)
            layer.adopt(module)
            try:
                layer.add_adapter(name, specs[path])
            except PatchError as error:
                raise PatchError(f"{path}: {error}") from None
            by_identity[id(module)] = layer
        replacements[path] = by_identity[id(module)]
    return replacements


def tied_to(model: nn.Module, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (path, other paths that hold the same weight) of those modules whose weight is tied."""
    owners = _owners(model)
    for path in paths:
        weight = model.get_submodule(path)._parameters["weight"]
        if others := [other for other in owners[id(weight)] if other != path]:
            yield path, others


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    return owners


def _trained_biases(model: nn.Module, config: Any, targets: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of the base's biases that the configuration trains."""
    if config.bias == "none":
        return
    if config.bias == "all":
        named = model.named_parameters(remove_duplicate=False)  # PEFT's files hold a tied one twice
        yield from (name for name, _ in named if name.rpartition(".")[2] == "bias")
        return
    seen: set[int] = set()
    for path, module in model.named_modules():
        if path in targets and id(module) not in seen and module._parameters.get("bias") is not None:
            seen.add(id(module))
            yield f"{path}.bias"


def _reports(
    model: nn.Module, config: Any, selection: Selection, layers: Mapping[str, AdapterMixin]
) -> Iterator[ModuleReport]:
    owners = _owners(model)
    for path, layer in layers.items():
        tied = [other for other in owners[id(layer.weight)] if other not in layers]
        detail = layer.adapter_repr() + (f", weight tied to {listed(tied)}" if tied else "")
        yield ModuleReport(path, "patched", detail)
    for path, reason in selection.skipped.items():
        if not trains_whole(path, config):  # it has a line of its own
            yield ModuleReport(path, "skipped", reason)


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether an adapter is on a Conv1D, whose weight is [in, out]."""
    return any(is_conv1d_like(layer) for _, layer in adapter_layers(model) if name in layer.specs)


def target_names(model: nn.Module, name: str, modules_to_save: tuple[str, ...]) -> list[str]:
    """Return the shortest names that mean exactly the modules with an adapter, by PEFT's rule.

    So PEFT and another version of fastpeft find the same ones.
    """
    return _shortest_names(
        model, (path for path, layer in adapter_layers(model) if name in layer.specs), modules_to_save
    )


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
