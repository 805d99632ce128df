"""AdaLoRA's allocation for transformers' ``Trainer``, under the optimiser that the Trainer makes."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fastpeft.allocation.allocator import RankAllocator


class RankAllocatorCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Allocates ranks in a ``Trainer`` with whatever optimiser its arguments name.

    >>> trainer.add_callback(RankAllocatorCallback())

    A resumed run goes on where the checkpoint's optimiser state stands.

    Args:
        adapter_name: which adapter; default: the only one that is AdaLoRA.
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name
        self.allocator: RankAllocator | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Put the allocator to work."""
        inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        if self.allocator is None or self.allocator.optimizer is not inner:
            self.allocator = RankAllocator(model, inner, adapter_name=self.adapter_name)
