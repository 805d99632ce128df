"""Allocate AdaLoRA's ranks during training: after every step of an optimiser, or when a loop says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.allocation import record, scores
from fastpeft.errors import CheckpointError, ConfigError, PatchError
from fastpeft.layers.adalora import KINDS, matrices_of
from fastpeft.methods.adalora import AdaLoRA, adalora_layers, ranks_of
from fastpeft.ops.orthogonality import orthogonality
from fastpeft.sparse.controller import is_no_training, unwrapped
from fastpeft.state import require_state
from fastpeft.targets import listed

_ATTACHED = "_fastpeft_allocator"
# Before a parameter's name, the scores' keys in the optimiser's state, while that is saved.
_LENT = ("adalora.sensitivity.", "adalora.uncertainty.")


class RankAllocator:
    """AdaLoRA's allocator (arXiv 2303.10512, algorithm 1) at work on a patched model.

    With an optimiser nothing needs to be called: it acts after each ``optimizer.step()``, while the gradients
    are still there.

    >>> fastpeft.patch(model, fastpeft.AdaLoRA(total_step=1000, tinit=100, tfinal=300))
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    >>> fastpeft.RankAllocator(model, optimizer)

    Its scores and its record are then in ``optimizer.state_dict()``, so :func:`fastpeft.save_training`, a
    ``Trainer``'s checkpoints and ``load_state_dict`` resume it at the very step. A state that was loaded
    before it came is taken up. Without an optimiser, call :meth:`update_and_allocate` and save
    :meth:`state_dict`.

    The ranks are PEFT's for the same gradients. A triplet that is masked has ``E = 0``; its tensors keep
    their size until they are saved and loaded, as in PEFT. With a layer-sparse schedule beside it, a
    parameter that has no gradient in a step keeps its last scores; what never trained has the score 0, and is
    the first that a budget leaves out. ``on_deactivate`` does not touch the scores.

    Args:
        model: patched with :class:`fastpeft.AdaLoRA`; DDP's or a compiled one is looked into.
        optimizer: any of torch's that has the adapter's parameters.
        adapter_name: which adapter; default: the only one that is AdaLoRA.

    Attributes:
        steps: how many steps of the optimiser it has seen.

    Raises:
        PatchError: the model has no such adapter, or its ranks are final; or the optimiser has an allocator,
            or lacks parameters of the adapter.
        CheckpointError: a state that the optimiser has loaded is of another training.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        adapter_name: str | None = None,
    ) -> None:
        inner = unwrapped(model)
        self.adapter_name = _name(inner, adapter_name)
        self.config: AdaLoRA = require_state(inner, "RankAllocator").configs[self.adapter_name]
        layers = adalora_layers(inner, self.adapter_name)
        self._ranks = ranks_of(list(layers.values()), self.adapter_name)
        if self._ranks.is_final:
            raise PatchError(
                f"RankAllocator: the ranks of {self.adapter_name!r} are final: it has a rank_pattern, and "
                "its layers are that small; fastpeft.load_training goes on with a training"
            )
        self._layers = layers
        ranks = {path: layer.specs[self.adapter_name].r for path, layer in layers.items()}
        self._static = record.static(self.config, ranks)
        self._triplets = sum(self._static["ranks"].values())
        self.steps = 0
        self.optimizer = optimizer
        self._hooks: list[Any] = []
        if optimizer is not None:
            self._attach(optimizer)

    @property
    def pattern(self) -> dict[str, tuple[bool, ...]]:
        """By module path, which of its triplets are kept; empty before the first allocation."""
        return dict(self._ranks.pattern)

    def update_and_allocate(self, step: int) -> int:
        """Score the triplets, and allocate if the step is one that does.

        To be called after ``optimizer.step()`` and before ``zero_grad()``; not where an optimiser was given.

        Args:
            step: the optimiser's steps before this one: 0, 1, ...

        Returns:
            How many triplets the budget pays for now.

        Raises:
            PatchError: nothing has a gradient, or there are no scores to allocate by: steps were left out, or
                a training was resumed without its state.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ConfigError(f"step: expected a whole number of at least 0, got {step!r}")
        config, ranks, parameters = self.config, self._ranks, self._parameters()
        last = config.total_step - config.tfinal
        budget, allocates = scores.budget_at(config, step, self._triplets, len(parameters))
        if step < last and not self.score():
            raise PatchError(
                f"update_and_allocate: no parameter of {self.adapter_name!r} has a gradient; expected a call "
                "after optimizer.step() and before optimizer.zero_grad()"
            )
        if not allocates:
            return budget
        if step <= last:
            if not ranks.scores:
                raise PatchError(f"update_and_allocate: step {step} allocates by scores, and there are none")
            kept = scores.kept_within(scores.triplet_scores(ranks, parameters), budget)
            self._store(kept)
        elif not ranks.pattern:
            raise PatchError(
                f"update_and_allocate: step {step} is after the last allocation, at {last}, which is missing"
            )
        else:
            kept = torch.tensor([stays for layer in parameters for stays in ranks.pattern[layer]])
        if step == last:
            ranks.scores.clear()
        scores.mask([members["lora_E"] for members in parameters.values()], kept)
        return budget

    def score(self) -> bool:
        """Take the gradients into the scores, and no more; False where there are no gradients."""
        config = self.config
        betas = (config.beta1, config.beta2)
        return scores.update_scores(self._ranks, self._parameters(), betas) > 0

    def score_tensors(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the scores' tensors, each with its parameter."""
        named = self._named()
        return [(named[name], tensor) for name, pair in self._ranks.scores.items() for tensor in pair]

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to go on, where no optimiser carries it: plain values and tensors."""
        return {"record": self._record(), "scores": {n: list(pair) for n, pair in self._ranks.scores.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            CheckpointError: it is of another training; nothing is changed.
        """
        found = record.read([{record.KEY: state.get("record")}])
        record.compare(found, self._static)
        parameters, given = self._named(), dict(state.get("scores") or {})
        wrong = [
            name
            for name, pair in given.items()
            if name not in parameters or any(t.shape != parameters[name].shape for t in pair)
        ]
        if wrong:
            raise CheckpointError(f"the rank allocation has scores of other parameters: {listed(wrong)}")
        self._stand(found)
        self._ranks.scores = {
            name: (pair[0].to(parameters[name], copy=True), pair[1].to(parameters[name], copy=True))
            for name, pair in given.items()
        }

    def remove(self) -> None:
        """Leave the optimiser alone; the ranks stay as they are."""
        if self.optimizer is not None:
            for hook in self._hooks:
                hook.remove()
            self.optimizer.param_groups[0].pop(record.KEY, None)
            delattr(self.optimizer, _ATTACHED)
            self.optimizer, self._hooks = None, []

    def _parameters(self) -> scores.Parameters:
        return {
            path: {kind: getattr(layer, kind)[self.adapter_name] for kind in KINDS}
            for path, layer in self._layers.items()
        }

    def _store(self, kept: Tensor) -> None:
        flat = iter(kept.tolist())
        ranks: dict[str, int] = self._static["ranks"]
        self._ranks.pattern = {path: tuple(next(flat) for _ in range(r)) for path, r in ranks.items()}

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        if allocator_of(optimizer) is not None:
            raise PatchError("RankAllocator: the optimizer has one already: remove() that one first")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [
            f"{path}.{kind}"
            for path, members in self._parameters().items()
            for kind, p in members.items()
            if id(p) not in held
        ]
        if names:
            raise PatchError(f"RankAllocator: the optimizer does not have {listed(names)}")
        if loaded := record.KEY in optimizer.param_groups[0]:  # a state came before the allocator
            found = record.read(optimizer.param_groups)
            record.compare(found, self._static)
            if len(self._lent(optimizer)) != found["scored"]:
                raise CheckpointError(
                    f"the optimiser's state should have the scores of {found['scored']} parameters, and has "
                    f"{len(self._lent(optimizer))}: a schedule that came before the RankAllocator took them; "
                    "make the RankAllocator first"
                )
        # Nothing raises from here on.
        setattr(optimizer, _ATTACHED, self)
        after_step = optimizer.register_step_post_hook(self._after_step)
        # Before a schedule, which frees the gradients of blocks whose turn is over.
        steps: Any = optimizer._optimizer_step_post_hooks
        steps.move_to_end(after_step.id, last=False)
        self._hooks = [
            after_step,
            optimizer.register_state_dict_pre_hook(self._before_saving),
            optimizer.register_state_dict_post_hook(self._after_saving),
            optimizer.register_load_state_dict_pre_hook(self._before_loading),
            # Before a schedule, which may drop the state of blocks that do not train.
            optimizer.register_load_state_dict_post_hook(self._after_loading, prepend=True),
        ]
        self._after_loading(optimizer) if loaded else self._write_record(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # GradScaler leaves it to a fused optimiser to skip a step, and to divide the gradients by its scale,
        # which torch's do in place: they are what they should be by now.
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        if is_no_training(optimizer) or (skipped is not None and bool(skipped)):
            return
        self.update_and_allocate(self.steps)
        self.steps += 1
        self._write_record(optimizer)

    def _record(self) -> dict[str, Any]:
        pattern = {path: list(kept) for path, kept in self._ranks.pattern.items()}
        now = {"steps": self.steps, "pattern": pattern, "scored": len(self._ranks.scores)}
        return {**self._static, **now}

    def _write_record(self, optimizer: torch.optim.Optimizer) -> None:
        # A new dict each time: a state_dict taken before must not change.
        optimizer.param_groups[0][record.KEY] = self._record()

    def _named(self) -> dict[str, nn.Parameter]:
        return {f"{p}.{kind}": value for p, m in self._parameters().items() for kind, value in m.items()}

    def _before_saving(self, optimizer: torch.optim.Optimizer) -> None:
        """Lend the scores to the optimiser's state: in new dicts, for those that are there are handed out."""
        named = self._named()
        stateful = [parameter for parameter in named.values() if optimizer.state.get(parameter)]
        for name, pair in self._ranks.scores.items():
            # Adam reads the step of every parameter that has a state: scores alone would be none for it.
            has_own = not stateful or optimizer.state.get(named[name])
            host = named[name] if has_own else stateful[0]
            lent = {f"{kind}{name}": tensor for kind, tensor in zip(_LENT, pair, strict=True)}
            optimizer.state[host] = {**optimizer.state.get(host, {}), **lent}

    def _after_saving(self, optimizer: torch.optim.Optimizer, _: Any = None) -> None:
        for parameter in self._named().values():
            state = optimizer.state.get(parameter) or {}
            if own := {key: value for key, value in state.items() if not str(key).startswith(_LENT)}:
                optimizer.state[parameter] = own
            elif state:
                del optimizer.state[parameter]

    def _before_loading(self, _: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        record.compare(record.read(state_dict.get("param_groups")), self._static)

    def _after_loading(self, optimizer: torch.optim.Optimizer) -> None:
        self._stand(record.read(optimizer.param_groups))
        self._ranks.scores = self._lent(optimizer)
        self._after_saving(optimizer)

    def _lent(self, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Tensor, Tensor]]:
        """The scores that are in the optimiser's state."""
        named = self._named()
        found = {k: v for p in named.values() for k, v in (optimizer.state.get(p) or {}).items()}
        names = [name for name in named if f"{_LENT[0]}{name}" in found]
        return {name: (found[f"{_LENT[0]}{name}"], found[f"{_LENT[1]}{name}"]) for name in names}

    def _stand(self, found: Mapping[str, Any]) -> None:
        self.steps = int(found["steps"])
        self._ranks.pattern = {path: tuple(kept) for path, kept in found["pattern"].items()}


def allocator_of(optimizer: torch.optim.Optimizer) -> RankAllocator | None:
    """Return the allocator that acts after an optimiser's steps."""
    return getattr(optimizer, _ATTACHED, None)


def update_and_allocate(model: nn.Module, step: int, adapter_name: str | None = None) -> int:
    """Score and allocate AdaLoRA's ranks at one step of a loop, as PEFT's ``model.update_and_allocate``.

    >>> optimizer.step()
    >>> fastpeft.update_and_allocate(model, step)
    >>> optimizer.zero_grad()

    :class:`RankAllocator` does it without a call, and is saved with the optimiser.

    Args:
        model: patched with :class:`fastpeft.AdaLoRA`.
        step: the optimiser's steps before this one: 0, 1, ...
        adapter_name: which adapter; default: the only one that is AdaLoRA.

    Returns:
        How many triplets the budget pays for now.

    Raises:
        PatchError: the model has no such adapter, its ranks are final, nothing has a gradient, or there are
            no scores to allocate by.
    """
    return RankAllocator(model, adapter_name=adapter_name).update_and_allocate(step)


def orthogonal_regularization(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """AdaLoRA's regulariser (:mod:`fastpeft.ops.orthogonality`), for loops that make their loss themselves.

    >>> loss = loss_of(model(x)) + 0.5 * fastpeft.orthogonal_regularization(model)

    A patched model adds it, times ``orth_reg_weight``, to the ``loss`` of its own output in training (PEFT
    does in evaluation too); it must not be added twice.

    Args:
        model: patched with :class:`fastpeft.AdaLoRA`.
        adapter_name: which adapter; default: the only one that is AdaLoRA.

    Returns:
        A scalar, not yet weighted.

    Raises:
        PatchError: the model has no such adapter.
    """
    inner = unwrapped(model)
    name = _name(inner, adapter_name)
    layers = adalora_layers(inner, name).values()
    return orthogonality([matrix for layer in layers for matrix in matrices_of(layer, name)])


def _name(model: nn.Module, name: str | None) -> str:
    """The AdaLoRA adapter that is meant."""
    configs = require_state(model, "AdaLoRA").configs
    ours = [n for n, config in configs.items() if isinstance(config, AdaLoRA)]
    if (name is None and len(ours) != 1) or (name is not None and name not in ours):
        asked = "one AdaLoRA adapter" if name is None else f"an AdaLoRA adapter {name!r}"
        has = {n: type(config).__name__ for n, config in configs.items()}
        raise PatchError(f"expected a model with {asked}, got one with {has}")
    return name or ours[0]
