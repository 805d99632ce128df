"""Linears of one module that are called with the same tensor, one after the other: q, k and v; gate and up.

The first of them computes all (:mod:`fastpeft.ops.stacked`: x is read once for all adapters, and kept once),
and the others, called with that tensor, have their results ready. Which ones they are is read from the
module's source (:mod:`fastpeft.blocks.source`); one that is called with another tensor after all computes its
own, and where that happens again and again they are left alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastpeft.blocks.view import dropout_of, view_of
from fastpeft.ops.stacked import stacked_linear

ATTRIBUTE = "_fastpeft_siblings"
MAX_MISSES = 3


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
        self._input: Tensor | None = None
        self._ready: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without what is only for the moment."""
        return {**self.__dict__, "_input": None, "_ready": {}}

    def result(self, name: str, x: Tensor) -> Tensor | None:
        """Return the linear's result for x where it is computed with its siblings, else None."""
        if self._ready:
            if self._input is x and name in self._ready:
                y = self._ready.pop(name)
                if not self._ready:
                    self._input = None
                return y
            self._drop()
        run = next((run for run in self.runs if run[0] == name), None)
        return None if run is None else self._all_of(run, x)

    def _all_of(self, run: tuple[str, ...], x: Tensor) -> Tensor | None:
        views = []
        for name in run:
            view = view_of(self.parent._modules[name], x)  # type: ignore[arg-type]
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
        self._input, self._ready = x, dict(zip(run[1:], rest, strict=True))
        return first

    def _drop(self) -> None:
        """Somebody was not called with the first one's input."""
        self._input, self._ready = None, {}
        self._misses += 1
        if self._misses >= MAX_MISSES:
            self.given_up, self.runs = self.runs, ()
