"""The optimisers that can be planned, by name: torch's, :class:`fastpeft.LayerSparseAdamW`, references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.allocation.allocator import RankAllocator, allocator_of
from fastpeft.errors import ConfigError
from fastpeft.methods.adalora import AdaLoRA
from fastpeft.planning import peers
from fastpeft.planning.devices import Device
from fastpeft.sparse.adamw import LayerSparseAdamW
from fastpeft.sparse.controller import LayerSparse
from fastpeft.sparse.schedule import Part, Policy, Schedule
from fastpeft.state import find_state

Make = Callable[[nn.Module], torch.optim.Optimizer]

# By name, the options of LayerSparseAdamW, or None: the optimiser is torch's own.
_ADAMW: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-fused": {"fused": True},
    "adamw-loop": {"foreach": False},
    "adamw-fp32-masters": {"master_weights": True},
    "adamw-bf16-moments": {"moments_dtype": torch.bfloat16},
    "adamw-fp32-moments": {"moments_dtype": torch.float32},
    "adamw-stochastic": {"stochastic_rounding": True},
}
_SGD: dict[str, dict[str, Any]] = {"sgd": {}, "sgd-momentum": {"momentum": 0.9}}
OPTIMIZERS = (*_ADAMW, *_SGD, *peers.PACKAGES)
_OURS = ("master_weights", "moments_dtype", "stochastic_rounding")


@dataclass(frozen=True)
class Places(Schedule):
    """Blocks by their places, one set an interval; the last one stays."""

    sets: tuple[frozenset[int], ...] = ()
    period: int = 1
    seed: int = 0

    def active(self, interval: int, blocks: Sequence[str], scores: Sequence[float]) -> frozenset[int]:
        """The interval's."""
        return self.sets[min(interval, len(self.sets) - 1)]


@dataclass(frozen=True)
class Turns:
    """Whose turn it is, what trains besides, and what becomes of the state of the others."""

    schedule: Places
    always_on: tuple[Part, ...]
    on_deactivate: Policy


def checked(optimizer: str | Make) -> str | Make:
    """Return the optimiser's name in its usual spelling, or the function that makes one.

    Raises:
        ConfigError: there is none of that name.
    """
    if callable(optimizer):
        return optimizer
    name = optimizer.strip().lower().replace(" ", "-").replace("_", "-") if isinstance(optimizer, str) else ""
    base, colon, rank = name.partition(":")
    if base not in OPTIMIZERS or (colon and not (base == "galore" and rank.isdigit() and int(rank) > 0)):
        raise ConfigError(
            f"optimizer: expected one of {', '.join(OPTIMIZERS)} (galore:64 for its rank), or a function of "
            f"the model that makes one, got {optimizer!r}"
        )
    if base in peers.PACKAGES and (reason := peers.missing(base)) is not None:
        raise ConfigError(f"optimizer: {reason}")
    return name


class _Scores(RankAllocator):
    """What AdaLoRA's allocator keeps, without what it decides: a plan's tensors have no values."""

    def _after_step(self, *_: Any) -> None:
        self.score()


def make(
    optimizer: str | Make, model: nn.Module, turns: Turns | None, device: Device
) -> tuple[torch.optim.Optimizer, LayerSparse | None]:
    """Return the optimiser of a model, and the schedule at work on it."""
    made, sparse = _make(optimizer, model, turns, device)
    state = find_state(model)
    for name, config in ({} if state is None else state.configs).items():
        if isinstance(config, AdaLoRA) and not config.rank_pattern and allocator_of(made) is None:
            _Scores(model, made, adapter_name=name)
    return made, sparse


def _make(
    optimizer: str | Make, model: nn.Module, turns: Turns | None, device: Device
) -> tuple[torch.optim.Optimizer, LayerSparse | None]:
    # torch takes ``foreach`` by itself for tensors that are on a GPU, which those of a plan only stand for.
    parameters = [p for p in model.parameters() if p.requires_grad]
    if callable(optimizer):
        made = optimizer(model)
        if turns is None or isinstance(made, LayerSparseAdamW):
            return made, getattr(made, "sparse", None)
        return made, _sparse(made, model, turns)
    if optimizer == "lomo":
        if turns is not None:
            raise ConfigError("optimizer: lomo has no step for a schedule to act after; expected another one")
        return peers.lomo(model), None
    if optimizer.startswith("galore"):
        # The step in which projections are made anew: no other holds more.
        rank = int(optimizer.partition(":")[2] or peers.GALORE_RANK)
        low_rank = peers.galore(model, rank, gap=1)
        return low_rank, None if turns is None else _sparse(low_rank, model, turns)
    gpu: dict[str, Any] = {"foreach": True} if device == "cuda" else {}
    if optimizer in _SGD:
        sgd = torch.optim.SGD(parameters, lr=1e-3, **gpu, **_SGD[optimizer])
        return sgd, None if turns is None else _sparse(sgd, model, turns)
    options = {**(gpu if "fused" not in _ADAMW[optimizer] else {}), **_ADAMW[optimizer]}
    if turns is None and not any(name in options for name in _OURS):
        return torch.optim.AdamW(parameters, lr=1e-3, **options), None
    ours = LayerSparseAdamW(
        model,
        schedule=None if turns is None else turns.schedule,
        always_on=None if turns is None else turns.always_on,
        on_deactivate=None if turns is None else turns.on_deactivate,
        **options,
    )
    return ours, ours.sparse


def _sparse(optimizer: torch.optim.Optimizer, model: nn.Module, turns: Turns) -> LayerSparse:
    return LayerSparse(
        optimizer,
        model,
        turns.schedule,
        always_on=turns.always_on,
        on_deactivate=turns.on_deactivate,
    )


def state_tensors(
    optimizer: torch.optim.Optimizer, sparse: LayerSparse | None
) -> Sequence[tuple[nn.Parameter, Tensor]]:
    """Return the tensors that an optimiser keeps, each with its parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [(p, optimizer.state.get(p) if sparse is None else sparse.state_of(p)) for p in parameters]
    found = [(p, t) for p, state in states for v in (state or {}).values() for t in tensors_in(v)]
    allocator = allocator_of(optimizer)
    return found if allocator is None else [*found, *allocator.score_tensors()]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in one entry of an optimiser's state, which may be an object (a projection)."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    return [tensor for entry in getattr(value, "__dict__", {}).values() for tensor in tensors_in(entry)]
