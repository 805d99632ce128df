"""The clock of the device that is measured: the processor's, or a GPU's own events.

A GPU runs behind the Python that feeds it, so its times are taken on its own stream, and read only when
everything was queued: the queue hides what launching costs as far as a training loop would hide it.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from bench.measure import Phases

FLUSH_BYTES = 256 * 2**20  # above every GPU's L2; what triton.testing.do_bench writes too


class Stopwatch:
    """Marks along one run; seconds between them afterwards."""

    __slots__ = ("_events", "_names", "_times")

    def __init__(self, device: torch.device) -> None:
        self._names: list[str] = []
        self._times: list[float] = []
        self._events: list[Any] | None = [] if device.type == "cuda" else None
        self.mark("")

    def mark(self, name: str) -> None:
        """End of the phase `name`, which began at the mark before."""
        if self._events is None:
            self._times.append(perf_counter())
        else:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        self._names.append(name)

    def phases(self, total: str) -> Phases:
        """Seconds of each phase, and from the first mark to the last under the name `total`."""
        if self._events is not None:
            self._events[-1].synchronize()
            first = self._events[0]
            self._times = [1e-3 * first.elapsed_time(event) for event in self._events]
            self._events = None
        times = self._times
        spans = {name: times[i + 1] - times[i] for i, name in enumerate(self._names[1:])}
        return {total: times[-1] - times[0], **spans}


def mean(runs: Sequence[Phases]) -> Phases:
    """The mean of each phase over `runs`."""
    return {phase: sum(run[phase] for run in runs) / len(runs) for phase in runs[0]}


def flush_cache(device: torch.device) -> None:
    """On a GPU push the last run's tensors out of L2, as the rest of a training step would."""
    if device.type == "cuda":
        torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()


def settle(device: torch.device) -> None:
    """Wait for what a GPU still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
