"""A model on the meta device: shapes and dtypes, no memory; from a configuration, a folder or a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import ConfigError
from fastpeft.targets import repeated_blocks

Make = Callable[[Tensor], Tensor]


def meta_model(source: Any, dtype: torch.dtype | None, attention: str | None) -> nn.Module:
    """Return the model that ``source`` stands for, on the meta device, in training mode.

    Args:
        source: an ``nn.Module`` (it is copied without its memory), a transformers configuration, a folder
            that holds ``config.json``, or that file.
        dtype: of the parameters; default the model's own, the configuration's, or fp32.
        attention: transformers' ``attn_implementation`` for a configuration; default ``"sdpa"``.

    Raises:
        ConfigError: it is nothing of these, or no causal language model; or transformers is missing.
    """
    if isinstance(source, nn.Module):
        if attention is not None:
            raise ConfigError("attention: expected None with a model, which has its own; give its config")
        model = _meta_copy(source)
        return (model if dtype is None else model.to(dtype)).train()
    transformers = _transformers()
    config = _configuration(transformers, source)
    if dtype is None:
        named = getattr(config, "dtype", None)
        dtype = named if isinstance(named, torch.dtype) else torch.float32
    config = copy.deepcopy(config)
    config.use_cache = False  # as transformers' Trainer has it
    try:
        with torch.device("meta"):
            built: nn.Module = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention or "sdpa"
            )
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"no causal language model from {type(config).__name__}: {reason}") from None
    return built.train()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "planning from a configuration needs transformers: pip install 'fastpeft[transformers]' "
            "(a model that is there can be planned without)"
        ) from None
    return transformers


def _configuration(transformers: Any, source: Any) -> Any:
    if isinstance(source, transformers.PretrainedConfig):
        return source
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            "plan: expected a model, a transformers configuration, or a folder with config.json, "
            f"got {type(source).__name__}"
        )
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise ConfigError(f"plan: expected a folder with config.json, or that file: {path} {what}")
    try:
        return transformers.AutoConfig.from_pretrained(str(file.parent if path.is_dir() else file))
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"plan: transformers cannot read {file}: {reason}") from None


def _meta_copy(model: nn.Module) -> nn.Module:
    """Copy everything of a model but the numbers."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ConfigError(
                f"plan: a {type(tensor).__name__} of shape {list(tensor.shape)} is no plain tensor: models "
                "with quantised or sharded weights are not planned yet"
            )
        memo[id(tensor)] = _like(
            tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        )
    return copy.deepcopy(model, memo)


def replace_tensors(model: nn.Module, make: Make) -> None:
    """Put another tensor, ``make(old)``, in the place of every parameter and buffer; tied ones stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = (tensor, _like(tensor, make))
                    members[name] = made[id(tensor)][1]  # type: ignore[assignment]


def _like(tensor: Tensor, make: Make) -> Tensor:
    made = make(tensor)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def containers(model: nn.Module) -> dict[str, list[str]]:
    """Return the lists of repeated blocks: path of the list to paths of its blocks, in order."""
    found: dict[str, list[str]] = {}
    for path, _ in repeated_blocks(model):
        found.setdefault(path.rpartition(".")[0], []).append(path)
    return found


@contextmanager
def only(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside, the lists of blocks hold only those at the given places."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    for path, places in kept.items():
        container = model.get_submodule(path)
        members = list(container._modules.values())
        before.append((container, container._modules))
        container._modules = {str(i): members[place] for i, place in enumerate(places)}
    try:
        yield
    finally:
        for container, modules in before:
            container._modules = modules


def signature(block: nn.Module) -> tuple[Any, ...]:
    """Return what blocks that need the same memory share: classes, settings, tensors; not their index."""
    found: list[Any] = []
    for path, module in block.named_modules():
        settings = tuple(
            (name, value)
            for name, value in sorted(module.__dict__.items())
            if isinstance(value, (bool, int, float, str, type(None)))
            and "idx" not in name
            and "index" not in name
        )
        tensors = tuple(
            (name, tuple(t.shape), t.stride(), t.dtype, t.requires_grad)
            for name, t in (*module._parameters.items(), *module._buffers.items())
            if t is not None
        )
        found.append((path, type(module), settings, tensors))
    return tuple(found)
