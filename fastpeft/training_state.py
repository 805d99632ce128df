"""Save a training as it stands and go on from there, to the bit: on one process, under DDP or FSDP2."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpeft import training_folder
from fastpeft.errors import CheckpointError, LayerSparseError
from fastpeft.sparse import record
from fastpeft.sparse.controller import unwrapped

_SHOWN = 4
_CONTENT = ("tensors", "state", "groups", "scheduler", "extra", "ranks", "random")


def save_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: str | os.PathLike[str],
    *,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write all that a training needs to go on: what it trains, the optimiser's state, random numbers.

    Frozen weights are left out: the optimiser's parameters and the model's buffers are written. Of a
    layer-sparse optimiser that is the moments of the blocks that train now (and of those kept aside), who
    they are, and how far the interval is. The tensors are safetensors, sharded by the rank that holds them.
    A process that is killed at any moment leaves the old state or the new one.

    Args:
        model: the module that trains; DDP's or a compiled one is looked into.
        optimizer: any of torch's, or :class:`LayerSparseAdamW`.
        folder: made if it does not exist. With torch.distributed, one that all ranks see; all must call.
        scheduler: a learning-rate scheduler.
        extra: anything else of plain values and tensors: the loader's place, a ``GradScaler``'s state.

    Returns:
        The folder.

    Raises:
        CheckpointError: it cannot be written; what was there stays whole.
    """
    inner, names = _named(model, optimizer)
    tensors: dict[str, Tensor] = {f"model.{n}": t for n, t in _trained(inner, names).items()}
    whole = optimizer.state_dict()
    state: dict[str, dict[str, Any]] = {}
    shapes: dict[str, tuple[str, list[int]]] = {}
    for place, values in whole["state"].items():
        entry = state.setdefault(names[place], {})
        for key, value in values.items():
            if isinstance(value, Tensor) and value.dim():
                entry[key] = None
                tensors[f"optimizer.{names[place]}.{key}"] = value
            else:
                entry[key] = value
    for key, value in tensors.items():
        shapes[key] = (str(value.dtype).removeprefix("torch."), list(value.shape))
    groups = [{**g, "params": [names[i] for i in g["params"]]} for g in whole["param_groups"]]
    randoms = _random_states()
    rest = {
        "tensors": shapes,
        "state": state,
        "groups": groups,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": None if extra is None else dict(extra),
        "ranks": dist.get_world_size() if _is_distributed() else 1,
        "random": [_device_of(key) for key in randoms],
    }
    training_folder.check_plain(rest, "save_training")
    path = Path(folder)
    training_folder.write(path, {**tensors, **randoms}, rest)
    return path


def load_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: str | os.PathLike[str],
    *,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Go on where :func:`save_training` stood, on any number of ranks.

    The model and the optimiser are made as for the first run; then this puts everything in its place. The
    random numbers are those of the rank with the same number, so as many ranks go on to the bit.

    Returns:
        What was given as ``extra``, else an empty dict.

    Raises:
        CheckpointError: the folder is missing, damaged or of another model or optimiser.
        LayerSparseError: it is of another schedule, set of blocks or precision; both list the differences,
            and nothing is changed.
    """
    path = Path(folder)
    found = training_folder.read(path)
    if missing := [key for key in _CONTENT if key not in found]:
        raise CheckpointError(f"load: {path / training_folder.NAME} lacks {', '.join(missing)}")
    inner, names = _named(model, optimizer)
    trained = _trained(inner, names)
    here = {name: parameter for name, parameter in inner.named_parameters() if name in set(names.values())}
    _compare_records(found, optimizer)
    _compare(path, found, trained, optimizer, names)
    if (found["scheduler"] is None) != (scheduler is None):
        which = "without one" if found["scheduler"] is None else "with one"
        raise CheckpointError(f"load: scheduler: {path} was saved {which}; load_training must be called so")
    values = {f"model.{name}": torch.empty_like(value) for name, value in trained.items()}
    for name, entry in found["state"].items():
        for key in (key for key, value in entry.items() if value is None):
            place = f"optimizer.{name}.{key}"
            if place in found["tensors"]:
                values[place] = _room(here[name], *found["tensors"][place])
    known = found["random"] if _rank() < found["ranks"] else []
    randoms = {key: value for key, value in _random_states().items() if _device_of(key) in known}
    training_folder.fill(path, found["part"], {**values, **randoms})
    _load_optimizer(optimizer, found, values, names)
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(values[f"model.{name}"])
    if scheduler is not None:
        scheduler.load_state_dict(found["scheduler"])
    for key, value in randoms.items():
        torch.cuda.set_rng_state(value) if _device_of(key) == "cuda" else torch.set_rng_state(value)
    return dict(found["extra"] or {})


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, dict[int, str]]:
    """The model itself, and the names of the optimiser's parameters by their place in it."""
    if not isinstance(model, nn.Module) or not isinstance(optimizer, torch.optim.Optimizer):
        raise CheckpointError(
            f"expected a torch.nn.Module and a torch.optim.Optimizer, got {type(model).__name__} "
            f"and {type(optimizer).__name__}"
        )
    inner = unwrapped(model)
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    places: dict[int, str] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) not in names:
            raise CheckpointError(
                f"the optimizer has a parameter of shape {list(parameter.shape)} "
                f"that is none of {type(inner).__name__}'s"
            )
        places[len(places)] = names[id(parameter)]
    return inner, places


def _trained(model: nn.Module, names: Mapping[int, str]) -> dict[str, Tensor]:
    """What a training changes in the model: the optimiser's parameters, and buffers that are saved."""
    wanted = set(names.values())
    found = {n: p.detach() for n, p in model.named_parameters() if n in wanted}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def _room(parameter: nn.Parameter, dtype: str, shape: list[int]) -> Tensor:
    """Memory for a tensor of a parameter's state, sharded as the parameter is."""
    kind = getattr(torch, str(dtype), None)
    if not isinstance(kind, torch.dtype):
        raise CheckpointError(f"load: expected the name of a torch dtype, got {dtype!r}")
    if list(parameter.shape) == list(shape):
        return torch.empty_like(parameter.detach(), dtype=kind)
    return torch.empty(shape, dtype=kind, device=parameter.device)


def _random_states() -> dict[str, Tensor]:
    states = {f"random.{_rank()}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.{_rank()}.cuda"] = torch.cuda.get_rng_state()
    return states


def _device_of(key: str) -> str:
    return key.rpartition(".")[2]


def _compare_records(found: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Refuse another schedule's state; LayerSparse's own check, before anything else is compared."""
    mine = optimizer.param_groups[0].get(record.KEY)
    theirs = found["groups"][0].get(record.KEY)
    if theirs is not None and mine is None:
        raise LayerSparseError(
            "the state was saved by a layer-sparse optimiser, and this one has no schedule; "
            "make LayerSparseAdamW or LayerSparse first"
        )
    if mine is not None:
        record.compare(record.read({"param_groups": found["groups"]}), mine)


def _compare(
    path: Path,
    found: dict[str, Any],
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
) -> None:
    """Refuse what was saved of another model or other parameter groups."""
    saved = {key.removeprefix("model."): value for key, value in found["tensors"].items()
             if key.startswith("model.")}  # fmt: skip
    mine = {n: (str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in trained.items()}
    lines = []
    for where, keys in (("in the file only", saved.keys() - mine), ("here only", mine.keys() - saved)):
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            lines.append(f"{where}: {', '.join(sorted(keys)[:_SHOWN])}{more}")
    for name in (n for n in mine if n in saved):
        if (saved[name][0], list(saved[name][1])) != mine[name]:
            lines.append(f"{name}: {saved[name]} in the file, {mine[name]} here")
    places = iter(names.values())
    groups = [[next(places) for _ in group["params"]] for group in optimizer.param_groups]
    if not lines and [group["params"] for group in found["groups"]] != groups:
        lines.append("the same parameters, in other parameter groups or in another order")
    if lines:
        shown = "\n".join(f"- {line}" for line in lines[: 2 * _SHOWN])
        raise CheckpointError(f"load: {path} is of another model or optimiser:\n{shown}")


def _load_optimizer(
    optimizer: torch.optim.Optimizer,
    found: dict[str, Any],
    values: Mapping[str, Tensor],
    names: Mapping[int, str],
) -> None:
    state = {}
    for place, name in names.items():
        if name in found["state"]:
            entry = found["state"][name]
            state[place] = {k: values.get(f"optimizer.{name}.{k}", v) for k, v in entry.items()}
    numbers = {name: place for place, name in names.items()}
    groups = [{**g, "params": [numbers[name] for name in g["params"]]} for g in found["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0
