"""Which modules a configuration means: names, suffixes, a regular expression, all-linear, or the blocks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from fastpeft.blocks.source import weights_read
from fastpeft.errors import PatchError
from fastpeft.fields import ALL_LINEAR
from fastpeft.layers.kinds import adapter_class, is_linear_like

_MAMBA_TYPES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1")  # PEFT refuses out_proj for these
_PACKED = ("Params4bit", "Int8Params")  # bitsandbytes': integers that stand for a 2-D matrix
_SHOWN = 8  # names listed in an error before "and N more"


class Targets(Protocol):
    """What a configuration says of modules."""

    @property
    def target_modules(self) -> tuple[str, ...] | str | None:
        """Names or dotted suffixes, one regular expression, ``"all-linear"``, or None."""

    @property
    def exclude_modules(self) -> tuple[str, ...] | str | None:
        """Names, suffixes or one regular expression, taken out again."""

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules that train whole."""

    @property
    def layers_to_transform(self) -> tuple[int, ...] | None:
        """Indices of the blocks; None for all."""


@dataclass(frozen=True)
class Selection:
    """Modules to patch by path, linears left out with the reason, entries that matched nothing."""

    targets: dict[str, nn.Module]
    skipped: dict[str, str]
    unmatched: tuple[str, ...]


def select(model: nn.Module, config: Targets, *, allow_unmatched: bool) -> Selection:
    """Return the modules of ``model`` that ``config`` targets.

    Args:
        model: any nn.Module.
        config: its ``target_modules``, ``exclude_modules``, ``modules_to_save`` and ``layers_to_transform``.
        allow_unmatched: accept entries of ``target_modules`` that match nothing, as long as another matches
            (PEFT's rule; ours is that every entry must match).

    Raises:
        PatchError: nothing matches, an entry matches nothing, or a named module cannot be patched.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = dict(repeated_blocks(model))
    explicit = config.target_modules is not None and config.target_modules != ALL_LINEAR
    skipped: dict[str, str] = {}
    targets: dict[str, nn.Module] = {}
    wanted = _explicit(modules, config) if explicit else _implicit(model, modules, blocks, config, skipped)
    for path in wanted:
        module = modules[path]
        if (reason := left_out(path, blocks, config)) is not None:
            skipped[path] = reason
        elif (problem := unpatchable(module)) is None:
            targets[path] = module
        elif explicit and not isinstance(config.target_modules, str):
            raise PatchError(f"{path}: {problem}; expected nn.Linear, nn.Embedding, a subclass, or Conv1D")
        else:
            skipped[path] = problem
    unmatched = _unmatched(modules, config) if explicit else ()
    if unmatched and not (allow_unmatched and targets):
        raise PatchError(_no_match_message(unmatched, modules))
    if not targets:
        raise PatchError(_nothing_message(model, config, skipped))
    for path, module in modules.items():
        if path not in targets and path not in skipped and is_linear_like(module):
            skipped[path] = "not targeted"
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point():
                skipped[f"{path}.{name}"] = _stacked(parameter, f"{path}.{name}")
    return Selection(targets, skipped, unmatched)


def _stacked(parameter: nn.Parameter, path: str) -> str:
    """Why a stacked 3-D weight is left out, and whose business it is: PEFT's, which forms W + B A."""
    short = ".".join(path.split(".")[-2:])
    return (
        f"3-D weight {list(parameter.shape)}, as of stacked experts: put adapters on it by "
        f"peft.LoraConfig(target_parameters=[{short!r}]) and patch that model"
    )


def repeated_blocks(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (path, index) of the blocks: children of the outermost lists of modules that hold linears."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, int]]:
        prefix = f"{path}." if path else ""
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_stack(module):
            yield from ((f"{prefix}{name}", index) for index, name in enumerate(module._modules))
            return
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}")

    yield from walk(model, "")


def _is_stack(container: nn.ModuleList | nn.Sequential) -> bool:
    if any(is_linear_like(child) for child in container):
        return False
    with_linears = [any(is_linear_like(m) for m in child.modules()) for child in container]
    if isinstance(container, nn.ModuleList):  # blocks of several classes too, as in hybrid models
        return len(container) > 0 and all(with_linears)
    return len({type(child) for child in container}) == 1 and any(with_linears)


def trains_whole(path: str, config: Targets) -> bool:
    """PEFT's rule for ``modules_to_save``: the path ends so, be it inside a name."""
    return path.endswith(config.modules_to_save)


def match_names(names: Iterable[str], path: str) -> bool:
    """PEFT's rule for lists: a name is the whole path or, after a dot, its end."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def matches(selector: Sequence[str] | str | None, path: str) -> bool:
    """Whether a selector, names or a regular expression, means a path."""
    if selector is None:
        return False
    if isinstance(selector, str):
        return re.fullmatch(selector, path) is not None
    return match_names(selector, path)


def _explicit(modules: dict[str, nn.Module], config: Targets) -> list[str]:
    # A regular expression names what it can reach; containers that it also happens to match are not meant.
    def meant(path: str, module: nn.Module) -> bool:
        if isinstance(config.target_modules, str):
            return is_linear_like(module) or not any(True for _ in module.children())
        return True

    return [p for p, m in modules.items() if p and matches(config.target_modules, p) and meant(p, m)]


def _implicit(
    model: nn.Module,
    modules: dict[str, nn.Module],
    blocks: dict[str, int],
    config: Targets,
    skipped: dict[str, str],
) -> list[str]:
    linears = [path for path, module in modules.items() if path and is_linear_like(module)]
    mamba = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES
    for path in linears:
        parent, _, name = path.rpartition(".")
        if (mamba and name == "out_proj") or (
            config.target_modules is None and _is_read(modules[parent], name)
        ):
            skipped[path] = f"{type(modules[parent]).__name__} reads its weight without calling it"
    linears = [path for path in linears if path not in skipped]
    if config.target_modules is None:
        return [path for path in linears if _block_index(path, blocks) is not None]
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    heads = {id(output)} if output is not None else set()
    if output is None and type(model).__name__.endswith("ForSequenceClassification"):
        # PEFT leaves a classification head, which is trained whole, out of all-linear.
        heads = {id(getattr(model, name, None)) for name in ("score", "classifier")}
    for path in linears:
        if id(modules[path]) in heads:
            skipped[path] = "output layer, not part of all-linear"
    return [path for path in linears if path not in skipped]


def _is_read(parent: nn.Module, name: str) -> bool:
    kind: Any = type(parent)
    return name in weights_read(kind)


def left_out(path: str, blocks: dict[str, int], config: Targets) -> str | None:
    """Return why a module is left out though it is targeted, or None; ``blocks`` is path to index.

    It is one of the repeated blocks' that count for ``layers_to_transform``.
    """
    if matches(config.exclude_modules, path):
        return "in exclude_modules"
    if any(trains_whole(prefix, config) for prefix in _prefixes(path)):
        return "in modules_to_save"
    if config.layers_to_transform is not None:
        index = _block_index(path, blocks)
        if index not in config.layers_to_transform:
            return "outside layers_to_transform"
    return None


def _prefixes(path: str) -> Iterator[str]:
    """Yield "a", "a.b", "a.b.c" for "a.b.c"."""
    parts = path.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _block_index(path: str, blocks: dict[str, int]) -> int | None:
    return next((blocks[prefix] for prefix in _prefixes(path) if prefix in blocks), None)


def unpatchable(module: nn.Module) -> str | None:
    """Return why a module cannot be patched, or None if it can."""
    kind = type(module).__name__
    if adapter_class(module) is None:
        return f"{kind} cannot be patched"
    if "forward" in module.__dict__:
        return f"the forward of this {kind} was replaced by other code (an accelerate hook, for one)"
    weight = module._parameters.get("weight")
    if weight is None:
        return f"the weight of this {kind} is not a plain Parameter"
    packed = type(weight).__name__ in _PACKED
    if not packed and (weight.dim() != 2 or not weight.is_floating_point() or weight.element_size() < 2):
        return f"its weight is {weight.dtype} {list(weight.shape)}, expected a 2-D floating-point matrix"
    return None


def _unmatched(modules: dict[str, nn.Module], config: Targets) -> tuple[str, ...]:
    selector = config.target_modules
    if isinstance(selector, str):
        return () if any(matches(selector, path) for path in modules) else (selector,)
    return tuple(name for name in selector or () if not any(match_names((name,), path) for path in modules))


def listed(names: Sequence[str]) -> str:
    """Return a comma-separated list, cut after a few with a count of the rest."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def shown_lines(lines: Sequence[str], shown: int = 12) -> str:
    """Return indented lines, cut after a few with a count of the rest."""
    more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
    return "\n  ".join([*lines[:shown], *more])


def _no_match_message(unmatched: Sequence[str], modules: dict[str, nn.Module]) -> str:
    known = sorted({path.rsplit(".", 1)[-1] for path, module in modules.items() if is_linear_like(module)})
    close = [hit for name in unmatched for hit in difflib.get_close_matches(name, known, n=1)]
    hint = f" Did you mean {listed(close)}?" if close else ""
    return (
        f"target_modules: no module of the model matches {listed([repr(n) for n in unmatched])}.{hint} "
        f"Its linear modules are named {listed(known)}"
    )


def _nothing_message(model: nn.Module, config: Targets, skipped: dict[str, str]) -> str:
    kind = type(model).__name__
    if config.target_modules is None and not skipped:
        return (
            f"{kind} has no repeated blocks (a ModuleList, or a Sequential of one class) with linears; "
            "name the modules with target_modules, or use target_modules='all-linear'"
        )
    reasons = listed([f"{path} ({reason})" for path, reason in skipped.items()])
    return f"nothing of {kind} is left to patch" + (f": {reasons}" if reasons else "")
