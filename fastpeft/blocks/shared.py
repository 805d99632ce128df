"""Linears of one module that are called with the same tensor, one after the other: q, k and v; gate and up.

The first of them computes all (:mod:`fastpeft.ops.stacked`: x is read once for all adapters, and kept once),
and the others, called with that tensor, have their results ready, unless x is so small that each computes its
own (:mod:`fastpeft.blocks.worth`). Which ones they are is read from the
module's source (:mod:`fastpeft.blocks.source`); one that is called with another tensor after all, or after x,
the adapters or the modes have changed, computes its own, and where that happens again and again they are left
alone.

What is ready and not fetched goes with x, or when the same thread computes other linears together: x is held
weakly, but a result that autograd has recorded keeps it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.blocks.stamp import stamp_of, version_of
from fastpeft.blocks.view import View, dropout_of, view_of
from fastpeft.blocks.worth import is_worth_it
from fastpeft.ops._common import autocast_is_on
from fastpeft.ops.stacked import stacked_linear

ATTRIBUTE = "_fastpeft_siblings"
MAX_MISSES = 3
# By thread, whose results are ready: one module's at a time.
_latest: dict[int, weakref.ref[Siblings]] = {}


class _Ready:
    """Results of one x, by name, and all that they depend on.

    Attributes:
        x: a weak reference; in compiled code x itself.
        conditions: :func:`_conditions` of x.
        results: those not fetched yet.
        stamps: :func:`fastpeft.blocks.stamp.stamp_of` their linears; none in compiled code.
        views: what was computed with, so that nothing else takes the place of a tensor that a stamp names.
    """

    def __init__(self, x: Any, conditions: tuple[object, ...], results: dict[str, Tensor]) -> None:
        self.x = x
        self.conditions = conditions
        self.results = results
        self.stamps: dict[str, tuple[object, ...]] = {}
        self.views: list[View] = []


class Siblings:
    """The linears of one module that share an input.

    Attributes:
        names: those with adapters, as children of the module.
        runs: of the names, those that share an input, in the order of the calls.
        given_up: what the runs were, once they turned out to be called with different tensors.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...], runs: tuple[tuple[str, ...], ...]) -> None:
        self.parent = parent
        self.names = names
        self.runs = runs
        self.given_up: tuple[tuple[str, ...], ...] = ()
        self._misses = 0
        self._ready: dict[int, _Ready] = {}  # by thread

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without what is only for the moment."""
        return {**self.__dict__, "_ready": {}}

    def result(self, name: str, x: Tensor) -> Tensor | None:
        """Return the linear's result for x where it is computed with its siblings, else None."""
        thread = _thread()
        if not is_worth_it(x):
            self.drop(thread)
            return None
        ready = self._ready.get(thread)
        if ready is not None:
            if name in ready.results and self._is_still_so(ready, name, x):
                y = ready.results.pop(name)
                if not ready.results:
                    self._forget(thread)
                return y
            self.drop(thread)
        for run in self.runs:
            if run[0] == name:
                return self._all_of(run, x, thread)
        return None

    def _is_still_so(self, ready: _Ready, name: str, x: Tensor) -> bool:
        if torch.compiler.is_compiling():
            return ready.x is x and ready.conditions == _conditions(x)
        if ready.x() is not x or ready.conditions != _conditions(x):
            return False
        layer = self.parent._modules.get(name)
        return layer is not None and ready.stamps[name] == stamp_of(layer)

    def _all_of(self, run: tuple[str, ...], x: Tensor, thread: int) -> Tensor | None:
        views = []
        for name in run:
            layer = self.parent._modules.get(name)
            view = None if layer is None else view_of(layer, x)
            if view is None:
                return None
            views.append(view)
        dropout = dropout_of(views)
        if dropout is None:
            return None
        ps, on_base = dropout
        first, *rest = stacked_linear(
            x, [view.projection for view in views], dropout_p=ps, dropout_on_base=on_base
        )
        self._keep(x, dict(zip(run[1:], rest, strict=True)), views, thread)
        return first

    def _keep(self, x: Tensor, results: dict[str, Tensor], views: list[View], thread: int) -> None:
        if torch.compiler.is_compiling():
            self._ready[thread] = _Ready(x, _conditions(x), results)
            return
        other = _latest.get(thread)
        if other is not None and (before := other()) is not None and before is not self:
            before.drop(thread)
        _latest[thread] = weakref.ref(self)
        siblings = weakref.ref(self)

        def gone(reference: object) -> None:
            owner = siblings()
            ready = None if owner is None else owner._ready.get(thread)
            if owner is not None and ready is not None and ready.x is reference:
                owner.drop(thread)

        ready = self._ready[thread] = _Ready(weakref.ref(x, gone), _conditions(x), results)
        ready.views = views
        for name in results:
            ready.stamps[name] = stamp_of(self.parent._modules[name])  # type: ignore[arg-type]

    def _forget(self, thread: int) -> None:
        self._ready.pop(thread, None)

    def drop(self, thread: int) -> None:
        """Forget what a thread has not fetched: somebody was not called with the first one's input."""
        if self._ready.pop(thread, None) is None:
            return
        self._misses += 1
        if self._misses >= MAX_MISSES and self.runs:
            self.given_up, self.runs = self.runs, ()


def _thread() -> int:
    """What tells threads apart; compiled code is traced by one, and has no constant of it."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _conditions(x: Tensor) -> tuple[object, ...]:
    """What a result depends on beside x's identity and its linear: x's version and the modes."""
    grads = torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else None
    if torch.compiler.is_compiling():
        return grads, dtype  # a change of x in place is one of the source's (fastpeft.blocks.source)
    return version_of(x), grads, torch.is_inference_mode_enabled(), dtype
