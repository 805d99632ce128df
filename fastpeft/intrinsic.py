"""How large the intrinsic dimension of a task is: the smallest d that reaches 90% of full training's metric.

Li et al. 2018 (arXiv 1804.08838) call it d_int90: the smallest d whose performance is at least 90%
of the baseline's, which trains all parameters. Aghajanyan et al. 2020 (arXiv 2012.13255) mean
the same: where full training reaches 85% accuracy, the d that reaches 0.9 * 85%. Both count from 0. A metric
that an untrained model scores on already can be counted from there, with ``floor``.

>>> from fastpeft import intrinsic
>>> found = intrinsic.measure(build, train, evaluate, ladder=[10, 100, 1000])
>>> found.d90, found.full
>>> found.plot("d90.png")
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft import fields
from fastpeft.errors import ConfigError
from fastpeft.methods.intrinsic import IntrinsicDimension
from fastpeft.patching import patch


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        d: numbers that trained; None: all parameters, full training.
        seed: of the projection, or None.
        score: of the evaluation after it.
        seconds: for training and evaluation.
    """

    d: int | None
    seed: int | None
    score: float
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """What :func:`measure` found.

    Attributes:
        full: full training's score.
        threshold: what a d must reach.
        points: every training, in order.
        d90: the smallest d whose mean score over the seeds reaches the threshold; None if none of those tried
            does.
    """

    full: float
    threshold: float
    points: tuple[Point, ...]
    d90: int | None

    @property
    def scores(self) -> dict[int, float]:
        """The mean score over the seeds, by d."""
        by_d: dict[int, list[float]] = {}
        for point in self.points:
            if point.d is not None:
                by_d.setdefault(point.d, []).append(point.score)
        return {d: sum(scores) / len(scores) for d, scores in by_d.items()}

    def __str__(self) -> str:
        lines = [f"full training {self.full:.4g}, to reach {self.threshold:.4g}"]
        for d, score in self.scores.items():
            lines.append(f"d={d:<9,} {score:.4g}{'  reached' if score >= self.threshold else ''}")
        lines.append("d90: none of these" if self.d90 is None else f"d90 = {self.d90:,}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw the scores over d as the papers do, to an image file; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        scores = self.scores
        axes.plot(list(scores), list(scores.values()), "o-", color="tab:blue", label="in d dimensions")
        runs = [point for point in self.points if point.d is not None]
        axes.plot([p.d or 0 for p in runs], [p.score for p in runs], ".", color="tab:blue", alpha=0.4)
        axes.axhline(self.full, color="black", label="full training")
        axes.axhline(self.threshold, color="gray", linestyle=":", label="threshold")
        if self.d90 is not None:
            axes.axvline(self.d90, color="tab:red", linestyle="--", label=f"d90 = {self.d90:,}")
        axes.set(xscale="log", xlabel="d", ylabel="score")
        axes.legend()
        figure.savefig(path)
        return Path(path)


def measure(
    build: Callable[[], nn.Module],
    train: Callable[[nn.Module], Any],
    evaluate: Callable[[nn.Module], float],
    ladder: Sequence[int],
    *,
    seeds: Sequence[int] = (0,),
    fraction: float = 0.9,
    floor: float = 0.0,
    full: float | None = None,
    stop_when_reached: bool = False,
    progress: Callable[[Point], Any] | None = None,
    **options: Any,
) -> Measurement:
    """Train fully, then in subspaces of each d, and return the smallest d that is as good, up to a fraction.

    Args:
        build: returns the model to start from, the same values at every call. All of its parameters train in
            the full training.
        train: trains, in place, the parameters that require gradients. Subspaces want other learning rates
            than full training: it can look at ``fastpeft.report(model)``, or search by itself.
        evaluate: returns a score, the higher the better.
        ladder: the values of d, tried in ascending order.
        seeds: of projections; the score of a d is the mean over them.
        fraction: of full training's score.
        floor: the score that counts as none; the papers' is 0.
        full: full training's score, where it is known; it is not trained then.
        stop_when_reached: leave out the values of d above the first that reaches the threshold.
        progress: called after every training.
        options: further fields of :class:`fastpeft.IntrinsicDimension`, such as ``structure_aware=True``.

    Raises:
        ConfigError: a value cannot work, or a score is not finite.
    """
    for d in (dimensions := sorted(set(ladder))):
        fields.check_count("ladder", d)
    if not dimensions or not seeds:
        raise ConfigError(f"ladder, seeds: expected at least one of each, got {ladder!r} and {seeds!r}")
    if not fields.is_number(fraction) or not 0 < fraction <= 1:
        raise ConfigError(f"fraction: expected a number in (0, 1], got {fraction!r}")
    configs = [[IntrinsicDimension(d=d, seed=seed, **options) for seed in seeds] for d in dimensions]
    points: list[Point] = []

    def run(config: IntrinsicDimension | None) -> float:
        start = time.perf_counter()
        model = build()
        if config is None:
            model.requires_grad_(True)
        else:
            patch(model, config)
        train(model)
        score = float(evaluate(model))
        if not math.isfinite(score):
            where = "full training" if config is None else f"d={config.d}, seed={config.seed}"
            raise ConfigError(f"evaluate: expected a finite score, got {score} after {where}")
        d, seed = (None, None) if config is None else (config.d, config.seed)
        points.append(Point(d, seed, score, time.perf_counter() - start))
        if progress is not None:
            progress(points[-1])
        return score

    best = run(None) if full is None else full
    threshold = floor + fraction * (best - floor)
    d90 = None
    for d, of_d in zip(dimensions, configs, strict=True):
        score = sum(run(config) for config in of_d) / len(of_d)
        if d90 is None and score >= threshold:
            d90 = d
            if stop_when_reached:
                break
    return Measurement(best, threshold, tuple(points), d90)
