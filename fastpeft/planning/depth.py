"""A deep model's step from a shallow one's: exact where blocks are alike, and a plan takes seconds.

Say a run of L blocks is alike: same classes, shapes and settings, all training or none. Until something of
the step is done with all of them, each adds the same bytes; so at any one point of the step, named by its
distance from the run's ends, the bytes alive are linear in L. Two steps of models with the run cut to
:data:`SHORT` blocks and one more give that line for the points in the first two and last two blocks and
outside; between the second and the last but one the bytes change linearly from block to block, so that
their largest value is at one of these two. The peak is the largest of these, which need not be at the same
point as in the short models.

The optimiser's step has no such simple form (it may update in chunks), and none is needed: it runs on the
whole model, without forward and backward.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastpeft.planning.building import containers, signature
from fastpeft.planning.step import Usage
from fastpeft.planning.tracking import Peak, Region

SHORT = 4  # blocks that a run is cut to: two at each end


@dataclass(frozen=True)
class Run:
    """Blocks in a row that are alike.

    Attributes:
        container: path of the list that holds them.
        first: place of the first of them in the list.
        length: how many they are.
    """

    container: str
    first: int
    length: int

    @property
    def is_long(self) -> bool:
        """Whether it is worth cutting."""
        return self.length > SHORT + 1


def runs(model: nn.Module, active: Callable[[str], bool]) -> list[Run]:
    """Return the model's runs, ``active`` telling by path whether a block trains."""
    found: list[Run] = []
    for container, blocks in containers(model).items():
        looks: list[Any] = [(signature(model.get_submodule(path)), active(path)) for path in blocks]
        place = 0
        for _, group in itertools.groupby(looks):
            length = len(list(group))
            found.append(Run(container, place, length))
            place += length
    return found


def kept(all_runs: Sequence[Run], longer: Run | None = None) -> dict[str, list[int]]:
    """Return the places of the blocks that stay in each list, with one run cut to one block more."""
    places: dict[str, list[int]] = {}
    for run in all_runs:
        length = min(run.length, SHORT + (run is longer)) if run.is_long else run.length
        places.setdefault(run.container, []).extend(_spread(run, length))
    return places


def _spread(run: Run, length: int) -> list[int]:
    """The first blocks of a run and its last two."""
    if length == run.length:
        return [run.first + i for i in range(length)]
    head = [run.first + i for i in range(length - 2)]
    return [*head, run.first + run.length - 2, run.first + run.length - 1]


class Names:
    """Paths in a cut model, as paths in the whole one."""

    def __init__(self, places: dict[str, list[int]]) -> None:
        self._places = places

    def whole(self, path: str) -> str:
        """Return the whole model's path for a cut model's."""
        for container, places in self._places.items():
            prefix = f"{container}." if container else ""
            if path.startswith(prefix):
                index, dot, rest = path[len(prefix) :].partition(".")
                if index.isdigit() and int(index) < len(places):
                    return f"{prefix}{places[int(index)]}{dot}{rest}"
        return path


def renamed(usage: Usage, names: Names, layer: Callable[[str], str]) -> Usage:
    """Return a cut model's usage under the whole model's names; regions by layer instead of by module."""
    components = {
        kind: Counter({names.whole(path): size for path, size in found.items()})
        for kind, found in usage.components.items()
    }
    peaks: dict[Region, Peak] = {}
    for region, peak in usage.peaks.items():
        wider = Region(region.phase, layer(names.whole(region.module)))
        if wider not in peaks or peak.bytes > peaks[wider].bytes:
            peaks[wider] = peak
    missing = frozenset(names.whole(name) for name in usage.without_gradient)
    return Usage(components, peaks, missing)


def extended(short: Usage, longer: Sequence[tuple[Run, Usage]]) -> Usage:
    """Return the whole model's usage.

    Args:
        short: with every long run cut to :data:`SHORT` blocks, under the whole model's names.
        longer: each long run, with the usage where that one alone has a block more.
    """
    peaks: dict[Region, Peak] = {}
    for region, peak in short.peaks.items():
        size, by_kind = peak.bytes, Counter(peak.by_kind)
        for run, usage in longer:
            more = run.length - SHORT
            other = usage.peaks.get(region, peak)
            size += more * (other.bytes - peak.bytes)
            for kind in {*by_kind, *other.by_kind}:
                by_kind[kind] += more * (other.by_kind.get(kind, 0) - peak.by_kind.get(kind, 0))
        peaks[region] = Peak(size, {kind: count for kind, count in by_kind.items() if count})
    components = {
        kind: _copied_to_the_middle(found, [run for run, _ in longer])
        for kind, found in short.components.items()
    }
    return Usage(components, peaks, short.without_gradient)


def _copied_to_the_middle(found: Counter[str], long_runs: Sequence[Run]) -> Counter[str]:
    result = Counter(found)
    for run in long_runs:
        prefix = f"{run.container}." if run.container else ""
        second = f"{prefix}{run.first + 1}"
        pattern = {p[len(second) :]: n for p, n in found.items() if p == second or p.startswith(f"{second}.")}
        for place in range(run.first + 2, run.first + run.length - 2):
            for rest, size in pattern.items():
                result[f"{prefix}{place}{rest}"] = size
    return result
