"""Timing by interleaved rounds, and the statistics made of them.

Contenders run in one process as A B C A B C ..., so that whatever else the machine does falls on all of
them alike. A ratio is taken within each round, and the median of those is reported: slow drift cancels,
which it does not in a ratio of two medians.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Phases = dict[str, float]
"""Seconds by phase of one run of a contender, for example `{"forward": 0.01, "backward": 0.02}`."""

Samples = dict[str, dict[str, list[float]]]
"""Contender -> phase -> seconds, one entry a round, so that equal indices are neighbours in time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A median with its lower and upper quartile."""

    low: float
    median: float
    high: float

    @property
    def half_range(self) -> float:
        """Half the interquartile range."""
        return (self.high - self.low) / 2

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """The quartiles of `samples`; one sample is its own spread."""
        if not samples:
            raise ValueError("no samples to take a median of")
        if len(samples) == 1:
            return Spread(low=samples[0], median=samples[0], high=samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(low=low, median=median, high=high)


def pairwise_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Ratio of two contenders round by round, then its quartiles."""
    if len(numerator) != len(denominator):
        raise ValueError(f"rounds differ: {len(numerator)} and {len(denominator)}")
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def interleave(
    runs: Mapping[str, Callable[[], Phases]],
    *,
    rounds: int,
    warmup: int = 2,
    on_run: Callable[[str], None] = lambda name: None,
) -> Samples:
    """Time `runs` in `rounds` interleaved rounds after `warmup` rounds whose times are thrown away.

    Each run times its own phases, so that what it must do between two measurements (clear gradients, touch
    parameters) stays outside. Cyclic garbage is collected between runs and not during them. `on_run` is told
    the contender's name before every run, warm-up included.
    """
    samples: Samples = {name: {} for name in runs}
    gc.collect()
    gc.freeze()  # a collection would walk all that is imported, longer than many runs take
    try:
        for index in range(warmup + rounds):
            for name, run in runs.items():
                on_run(name)
                gc.collect()
                gc.disable()
                try:
                    phases = run()
                finally:
                    gc.enable()
                if index >= warmup:
                    for phase, seconds in phases.items():
                        samples[name].setdefault(phase, []).append(seconds)
    finally:
        gc.unfreeze()
    return samples
