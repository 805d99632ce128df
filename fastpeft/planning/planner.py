"""From a model, a method and a batch to what every part of the step holds."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn

from fastpeft.errors import ConfigError
from fastpeft.planning import depth
from fastpeft.planning.building import containers, only
from fastpeft.planning.devices import Device, on_device
from fastpeft.planning.methods import Method
from fastpeft.planning.optimizers import Make, Places, Turns, make
from fastpeft.planning.step import Usage, step_alone, train
from fastpeft.planning.tracking import Peak, Region
from fastpeft.sparse.candidates import find
from fastpeft.sparse.schedule import Schedule, StaticImportance, TopK

_ON_A_DEVICE = ("adamw-fused", "adamw-stochastic")  # a fused kernel and a generator want a device


class Planner:
    """Plans one method on one model, for any batch.

    Args:
        model: on the meta device, as :func:`fastpeft.planning.building.meta_model` returns it; not changed.
        method: what trains.
        optimizer: a name, or a function of the model.
        device: what is planned for.
        checkpointing: whether blocks keep their input alone, and run again in the backward pass.
        exact_depth: run every block, also where many are alike.

    Attributes:
        blocks: paths of the model's repeated blocks.
        active: places of those that train in the step that is planned; None: no schedule.
        dtype: of the weights.
        parameters: how many elements the model has, adapters included; ``trainable``: how many may train.

    Raises:
        ConfigError: the model cannot be trained so.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optimizer: str | Make,
        device: Device,
        *,
        checkpointing: bool,
        exact_depth: bool,
    ) -> None:
        self._model = model
        self._method = method
        self._optimizer = optimizer
        self._device = device
        self._exact_depth = exact_depth
        self._lists = containers(model)
        self.blocks = [path for paths in self._lists.values() for path in paths]
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        if parameter is None:
            raise ConfigError(f"plan: {type(model).__name__} has no floating-point parameters")
        self.dtype: torch.dtype = parameter.dtype
        if checkpointing:
            self._checkpoint(model)
        self._prepared = copy.deepcopy(model)
        method.prepare(self._prepared)
        if not any(p.requires_grad for p in self._prepared.parameters()):
            raise ConfigError(f"plan: with method {method.label!r} no parameter of the model trains")
        self.trainable = sum(p.numel() for p in self._prepared.parameters() if p.requires_grad)
        self.parameters = sum(p.numel() for p in self._prepared.parameters())
        self.active = None if method.schedule is None else self._expensive(method.schedule)
        self._alone: Usage | None = None

    @staticmethod
    def _checkpoint(model: nn.Module) -> None:
        enable: Any = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
            raise ConfigError(f"checkpointing: {type(model).__name__} has no gradient_checkpointing_enable")
        # Without the state of the random numbers, 5 kB a block, which a model without memory cannot restore.
        enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False})

    def _expensive(self, schedule: Schedule) -> frozenset[int]:
        """The places of the blocks that cost most when they train together.

        Gradients of the highest blocks are there longest beside the activations of those below. Where no
        embeddings train, the graph ends at the lowest active block, and it counts most how low that is.
        """
        schedule.check(self.blocks)
        n = len(self.blocks)
        if n == 0:
            raise ConfigError("plan: the model has no repeated blocks for a schedule to choose from")
        count = len(schedule.active(0, self.blocks, [0.0] * n))
        if isinstance(schedule, StaticImportance) and not schedule.draw:
            return schedule.active(0, self.blocks, [0.0] * n)
        trained = [p for p in self._prepared.parameters() if p.requires_grad]
        embeddings = find(self._prepared, trained, None).parts["embeddings"]
        reaches_bottom = "embeddings" in schedule.always_on and len(embeddings) > 0
        if reaches_bottom or isinstance(schedule, TopK):
            return frozenset(range(n - count, n))
        return frozenset({0, *range(n - count + 1, n)})

    def usage(self, batch: int, sequence: int) -> Usage:
        """Return what a step holds; with a schedule, where its choice of blocks is the most expensive."""
        active = self.active
        trains = {path for i, path in enumerate(self.blocks) if active is None or i in active}
        runs = depth.runs(self._prepared, trains.__contains__)
        long = [] if self._exact_depth else [run for run in runs if run.is_long]
        if long:
            short = self._cut(depth.kept(runs), batch, sequence)
            longer = [(run, self._cut(depth.kept(runs, run), batch, sequence)) for run in long]
            usage = depth.extended(short, longer)
        else:
            usage = self._cut({c: list(range(len(b))) for c, b in self._lists.items()}, batch, sequence)
        return self._with_optimizer(usage)

    def layer(self, path: str) -> str:
        """Return the block that a module is in, or the module itself outside."""
        return next((b for b in self.blocks if path == b or path.startswith(f"{b}.")), path)

    def _cut(self, places: dict[str, list[int]], batch: int, sequence: int) -> Usage:
        """Train the model with the blocks at these places alone."""
        with only(self._model, places):
            model = copy.deepcopy(self._model)
        self._method.prepare(model)
        names = depth.Names(places)
        left = [names.whole(path) for paths in containers(model).values() for path in paths]
        trained = None if self.active is None else {self.blocks[i] for i in self.active}
        active = None if trained is None else [i for i, path in enumerate(left) if path in trained]
        turns = self._turns(active, len(left))
        optimizer = self._loop_form() if self._device == "cuda" else self._optimizer
        with on_device(model, self._device, self.dtype) as zeros:
            try:
                usage = train(
                    model,
                    zeros(batch, sequence, dtype=torch.int64),
                    partial(make, optimizer, turns=turns, device=self._device),
                    without_values=True,
                    warm_up=_turns_before(turns),
                )
            except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ConfigError(
                    f"plan: {type(model).__name__} cannot be run without values: {reason}"
                ) from error
        return depth.renamed(usage, names, self.layer)

    def _loop_form(self) -> str | Make:
        """Fused steps refuse tensors that are on no device; what they keep is what others keep."""
        return "adamw-loop" if self._optimizer == "adamw-fused" else self._optimizer

    def _turns(self, active: list[int] | None, blocks: int) -> Turns | None:
        """The schedule that trains these blocks, after all others where their state is kept."""
        schedule = self._method.schedule
        if schedule is None or active is None:
            return None
        policy = schedule.on_deactivate
        now = frozenset(active)
        others = [i for i in range(blocks) if i not in now] if policy == "keep" else []
        before = [frozenset(others[i : i + len(now)]) for i in range(0, len(others), len(now))]
        return Turns(Places(sets=(*before, now)), tuple(sorted(schedule.always_on)), policy)

    def _with_optimizer(self, usage: Usage) -> Usage:
        """Put the whole model's optimiser step, run alone, in the place of the cut one's."""
        alone = self._alone = self._alone or self._step_alone(usage)
        there = Counter({kind: usage.total(kind) for kind in ("caches", "inputs")})
        peaks = {region: peak for region, peak in usage.peaks.items() if region.phase != "optimizer"}
        steps = [peak for region, peak in alone.peaks.items() if region.phase == "optimizer"]
        most = max(steps, key=lambda peak: peak.bytes)
        peaks[Region("optimizer", "")] = Peak(most.bytes + there.total(), dict(Counter(most.by_kind) + there))
        return Usage({**usage.components, **alone.components}, peaks, usage.without_gradient)

    def _step_alone(self, usage: Usage) -> Usage:
        """The optimiser's step, the same on every device but for fused ones, which want to be on one."""
        model = copy.deepcopy(self._prepared)
        turns = self._turns(None if self.active is None else sorted(self.active), len(self.blocks))
        without = {self._relative(name) for name in usage.without_gradient}
        with on_device(model, "cpu" if self._optimizer in _ON_A_DEVICE else "cuda", self.dtype):
            return step_alone(
                model,
                partial(make, self._optimizer, turns=turns, device=self._device),
                lambda name: self._relative(name) in without,
                warm_up=_turns_before(turns),
            )

    def _relative(self, name: str) -> str:
        """A parameter's name, the same for those of all blocks that have the same place in theirs."""
        block = self.layer(name)
        return name if block == name else name[len(block) :]


def _turns_before(turns: Turns | None) -> int:
    """How many intervals come before the planned one, for the state that is kept."""
    return 0 if turns is None else len(turns.schedule.sets) - 1
