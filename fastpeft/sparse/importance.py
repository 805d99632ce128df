"""IST's forwards: the loss of the last training batch with the adapters of some blocks suppressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import LayerSparseError
from fastpeft.sparse.suppression import Responses, evaluating


class Importance:
    """The model, its adapters by block, and its last training batch."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], loss_of_output: Callable[[Any], Tensor] | None
    ) -> None:
        self._model = model
        self._responses = Responses(model, blocks)
        self._loss_of_output = loss_of_output
        self._batch: tuple[tuple[Any, ...], dict[str, Any], tuple[bool, torch.dtype]] | None = None
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def remove(self) -> None:
        """Stop watching the model's forwards."""
        self._hook.remove()
        self._batch = None

    def _before_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._model.training and torch.is_grad_enabled():
            kind = _device_type(self._model)
            autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            self._batch = (args, kwargs, autocast)

    @torch.no_grad()
    def losses(
        self, sets: Sequence[frozenset[int]], factor: float, loss: Callable[[], Tensor | float] | None
    ) -> list[float]:
        """Return the loss for each set of suppressed blocks, without dropout.

        Raises:
            LayerSparseError: there is no batch yet, or no loss in the model's output.
        """
        found = []
        with evaluating(self._model), self._responses.applied() as suppress:
            for chosen in sets:
                suppress(chosen, factor)
                found.append(float(self._run() if loss is None else loss()))
        return found

    def _run(self) -> Tensor:
        if self._batch is None:
            raise LayerSparseError("IST: no training batch has gone through the model yet")
        args, kwargs, (enabled, dtype) = self._batch
        with torch.autocast(_device_type(self._model), dtype=dtype, enabled=enabled):
            output = self._model(*args, **kwargs)
        if self._loss_of_output is not None:
            return self._loss_of_output(output)
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise LayerSparseError(
                f"IST needs a loss: the model's output ({type(output).__name__}) has none. Give the model "
                "its labels, or importance_loss, a function of the output; or call update_importance(loss)"
            )
        return loss


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type
