"""Layer-sparse training under any torch optimiser: who trains, who waits, and what is kept for whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import ConfigError, LayerSparseError
from fastpeft.sparse import record
from fastpeft.sparse.candidates import Candidates, find, resume, suspend
from fastpeft.sparse.importance import Importance
from fastpeft.sparse.ist import IST
from fastpeft.sparse.ranks import Ranks
from fastpeft.sparse.reentrant import check_gradients
from fastpeft.sparse.schedule import PARTS, POLICIES, Part, Policy, Schedule
from fastpeft.sparse.states import Aside

_ATTACHED = "_fastpeft_sparse"


class LayerSparse:
    """A schedule at work on a model and its optimiser.

    It acts after each ``optimizer.step()``. Where the schedule's next interval begins, blocks whose turn is
    over stop to require gradients, their gradients are freed and their optimiser state is dropped, kept
    aside or moved to host memory; those whose turn it is start to train. Gradient accumulation, closures,
    gradient scaling and learning-rate schedulers work as ever, since a step is a step.

    The record of where it stands is in the first parameter group, so that ``optimizer.state_dict()`` holds it
    and ``load_state_dict`` resumes at the very step.

    Args:
        optimizer: any ``torch.optim.Optimizer``; what trains is chosen among its parameters.
        model: the module whose blocks they are.
        schedule: :class:`LISA`, :class:`IST`, :class:`BAdam`, :class:`TopK` or :class:`StaticImportance`.
        blocks: paths of modules, each one block; default: the model's repeated blocks, found by structure.
        always_on: what trains besides, of ``"embeddings"``, ``"norms"``, ``"head"`` (all outside the blocks)
            and ``"other"``; default: the schedule's.
        on_deactivate: ``"drop"``, ``"keep"`` or ``"offload"``; default: the schedule's.
        importance_loss: for IST: the loss of a model's output; default ``output.loss``.

    Raises:
        ConfigError: an argument cannot work with this model.
        LayerSparseError: the model has no blocks that the optimiser trains.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        schedule: Schedule,
        *,
        blocks: Sequence[str] | None = None,
        always_on: Sequence[Part] | None = None,
        on_deactivate: Policy | None = None,
        importance_loss: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ConfigError(f"schedule: expected a fastpeft schedule such as LISA(), got {schedule!r}")
        self.model = unwrapped(model)
        self.schedule = schedule
        self.always_on = _parts(schedule.always_on if always_on is None else always_on)
        policy = schedule.on_deactivate if on_deactivate is None else on_deactivate
        if policy not in POLICIES:
            raise ConfigError(f"on_deactivate: expected one of {', '.join(POLICIES)}, got {policy!r}")
        self.on_deactivate = policy
        if getattr(optimizer, _ATTACHED, False):
            raise LayerSparseError("the optimizer has a schedule already: remove() that one first")
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._candidates: Candidates = find(self.model, parameters, blocks)
        self.blocks = tuple(self._candidates.blocks)
        schedule.check(self.blocks)
        self._aside = Aside(optimizer, policy)
        self._ranks = Ranks(self.model)
        self._importance: Importance | None = None
        if isinstance(schedule, IST):
            self._importance = Importance(self.model, self.blocks, importance_loss)
        self.steps = 0
        self.updates = 0
        self.scores: tuple[float, ...] = (0.0,) * len(self.blocks)
        self.active: tuple[str, ...] = ()
        self._unchecked = True
        names = self._candidates.names
        everyone = (*self._candidates.blocks.values(), *self._candidates.parts.values())
        self._parameters = sorted(f"{names[id(p)]} {list(p.shape)}" for part in everyone for p in part)
        self.options: dict[str, Any] = {"always_on": sorted(self.always_on), "on_deactivate": policy}
        loaded = record.KEY in optimizer.param_groups[0]  # a state was loaded before the schedule came
        try:
            if loaded:
                self._before_loading(None, {"param_groups": optimizer.param_groups})
            chosen = self._chosen()
            self._ranks.agree(self._fingerprint(chosen))
        except Exception:
            self._stop_watching()
            raise
        # Nothing raises from here on.
        setattr(optimizer, _ATTACHED, True)
        self._hooks = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._before_saving),
            optimizer.register_state_dict_post_hook(self._after_saving),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]
        for part, members in self._candidates.parts.items():
            for parameter in members:
                resume(parameter) if part in self.always_on else self._stop(parameter)
        if loaded:
            self._after_loading()
        else:
            self._apply(chosen, anew=True)
            self.write_record()

    @property
    def interval(self) -> int:
        """The current interval, from 0."""
        return self.steps // self.schedule.period

    @property
    def record(self) -> dict[str, Any]:
        """Where it stands, as plain values; :meth:`resume` takes it."""
        return dict(self.optimizer.param_groups[0][record.KEY])

    def resume(self, found: Mapping[str, Any]) -> None:
        """Stand where a record says, without optimiser state: who trains is known before the state comes.

        For ``torch.distributed.checkpoint``'s ``set_optimizer_state_dict``, which wants an optimiser that
        trains what the file has. :func:`fastpeft.load_training` and ``load_state_dict`` do it by themselves.

        Raises:
            LayerSparseError: it is of another model, schedule or precision; nothing is changed.
        """
        groups: list[dict[str, Any]] = [{record.KEY: dict(found)}]
        self._before_loading(None, {"param_groups": groups})
        self._stand(record.read({"param_groups": groups}))
        self.write_record()

    def remove(self) -> None:
        """Let every parameter train again and leave the optimiser alone; it gets back what was kept aside."""
        for hook in self._hooks:
            hook.remove()
        for members in (*self._candidates.blocks.values(), *self._candidates.parts.values()):
            for parameter in members:
                resume(parameter)
                self._aside.take(parameter)
        self._stop_watching()
        self.optimizer.param_groups[0].pop(record.KEY, None)
        delattr(self.optimizer, _ATTACHED)

    def _stop_watching(self) -> None:
        if self._importance is not None:
            self._importance.remove()
        self._ranks.remove()

    def state_tensors(self) -> list[Tensor]:
        """Return every tensor that the optimiser's state holds now, kept aside or not."""
        values = [v for state in self.optimizer.state.values() for v in state.values()]
        return [v for v in values if isinstance(v, Tensor)] + self._aside.tensors()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any] | None:
        """Return what the optimiser keeps for a parameter, aside or not."""
        kept = self._aside.get(parameter)
        return self.optimizer.state.get(parameter) if kept is None else kept

    def update_importance(self, loss: Callable[[], Tensor | float] | None = None) -> None:
        """IST's scoring, now: a few forwards without a graph, each with some adapters suppressed.

        It is done by itself every ``update_every`` steps on the step's last batch; a loop whose loss is not
        the model's ``output.loss`` may call it instead, or give ``importance_loss``.

        Args:
            loss: runs the model and returns the loss; default: the model on its last training batch.
        """
        if self._importance is None or not isinstance(self.schedule, IST):
            raise LayerSparseError(f"update_importance is IST's; the schedule is {self.schedule!r}")
        sets = self.schedule.suppressed_sets(self.updates, self.scores)
        losses = self._importance.losses(sets, self.schedule.suppression_factor, loss)
        self.scores = tuple(self.schedule.rewarded(self.scores, sets, self._ranks.mean(losses)))
        self.updates += 1

    def _after_step(self, *_: Any) -> None:
        if is_no_training(self.optimizer):
            return
        if self.steps == 0:
            self._ranks.agree(self._fingerprint(self.active))
        if self._unchecked:
            check_gradients(self.model, {name: self._candidates.blocks[name] for name in self.active})
            self._unchecked = False
        self.steps += 1
        if isinstance(self.schedule, IST) and self.steps % self.schedule.update_every == 0:
            self.update_importance()
        if self.steps % self.schedule.period == 0:
            chosen = self._chosen()
            if chosen != self.active:
                self._ranks.agree(self._fingerprint(chosen))
                self._apply(chosen)
        self.write_record()

    def _chosen(self) -> tuple[str, ...]:
        places = self.schedule.active(self.interval, self.blocks, self.scores)
        return tuple(self.blocks[i] for i in sorted(places))

    def _apply(self, chosen: tuple[str, ...], *, anew: bool = False) -> None:
        """Let the chosen blocks train, and no others."""
        if chosen == self.active and not anew:
            return
        for name, members in self._candidates.blocks.items():
            for parameter in members:
                if name in chosen:
                    resume(parameter)
                    self._aside.take(parameter)
                else:
                    self._stop(parameter)
        self.active = chosen
        self._ranks.changed()
        self._unchecked = True

    def _stop(self, parameter: nn.Parameter) -> None:
        suspend(parameter)
        self._aside.put(parameter)

    def _fingerprint(self, chosen: Sequence[str]) -> str:
        return repr((self.steps, self.schedule.describe(), self.options, self.blocks, tuple(chosen)))

    def _static_record(self) -> dict[str, Any]:
        return {
            "version": record.VERSION,
            "schedule": self.schedule.describe(),
            "options": self.options,
            "blocks": list(self.blocks),
            "parameters": self._parameters,
        }

    def write_record(self) -> None:
        """Put where it stands into the optimiser's first parameter group."""
        now = {"steps": self.steps, "updates": self.updates, "scores": list(self.scores)}
        # A new dict each time: a state_dict taken before must not change.
        self.optimizer.param_groups[0][record.KEY] = {
            **self._static_record(),
            **now,
            "active": list(self.active),
        }

    def _before_saving(self, *_: Any) -> None:
        self._aside.lend()

    def _after_saving(self, *_: Any) -> None:
        self._aside.end_loan()

    def _before_loading(self, _: Any, state_dict: dict[str, Any]) -> None:
        record.compare(record.read(state_dict), self._static_record())

    def _after_loading(self, *_: Any) -> None:
        self._stand(record.read({"param_groups": self.optimizer.param_groups}))

    def _stand(self, found: Mapping[str, Any]) -> None:
        self.steps, self.updates = int(found["steps"]), int(found["updates"])
        self.scores = tuple(float(score) for score in found["scores"])
        self._aside.forget()
        self._apply(tuple(found["active"]), anew=True)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel or a compiled module."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_no_training(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step was torch.distributed.checkpoint's, which makes state and moves nothing."""
    if any(group.get("lr") != 0.0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return not any(bool(g.any()) for g in gradients if g is not None)


def _parts(given: Sequence[Part]) -> frozenset[Part]:
    if isinstance(given, str) or any(part not in PARTS for part in given):
        raise ConfigError(f"always_on: expected names of {', '.join(PARTS)}, got {given!r}")
    return frozenset(given)
