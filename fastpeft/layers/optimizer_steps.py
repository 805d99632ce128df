"""Which parameters a ``torch.optim`` step wrote last: evidence where a tensor's ``_version`` is none.

torch's fused optimisers leave ``_version`` as it was (measured with torch 2.13), and so do optimisers that
write through ``.data`` or from their own kernels. The global post-step hook sees every subclass of
``torch.optim.Optimizer``, a compiled ``step`` too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(slots=True)
class Steps:
    """What was seen of one parameter.

    Attributes:
        count: steps of optimisers that hold the parameter.
        after: its (address, version) after the last of them.
        replayed: a step was captured in a CUDA graph, whose replays run no Python and cannot be seen.
    """

    parameter: weakref.ref[Tensor]
    count: int = 0
    after: tuple[int, int] | None = None
    replayed: bool = False

    def wrote_last(self, parameter: Tensor) -> bool:
        """Whether nothing that shows has changed the parameter since an optimiser's step."""
        return not self.replayed and self.after == (parameter.data_ptr(), parameter._version)


class OptimizerSteps:
    """The record of every followed parameter; the hook is registered with the first."""

    def __init__(self) -> None:
        self._records: dict[int, Steps] = {}
        self._registered = False

    def follow(self, parameter: Tensor) -> Steps:
        """Return the parameter's record, begun now if there is none."""
        identity = id(parameter)
        record = self._records.get(identity)
        if record is None or record.parameter() is not parameter:
            if not self._registered:
                # Run, not traced: the count would make a compiled step compile anew at every step.
                hook = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
                register_optimizer_step_post_hook(hook)
                self._registered = True
            records = self._records
            record = Steps(weakref.ref(parameter, lambda _: records.pop(identity, None)))
            records[identity] = record
        return record

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            parameters: list[Tensor] = group["params"]
            for parameter in parameters:
                record = self._records.get(id(parameter))
                if record is not None and parameter is record.parameter():
                    record.count += 1
                    record.after = (parameter.data_ptr(), parameter._version)
                    record.replayed = record.replayed or _is_capturing(parameter)


def _is_capturing(parameter: Tensor) -> bool:
    return parameter.is_cuda and torch.cuda.is_current_stream_capturing()


STEPS = OptimizerSteps()
