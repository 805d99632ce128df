"""Bars of a document: speed against the peer, and bytes against the peer with the floor marked.

Colours are Okabe and Ito's, which people who see few colours tell apart; a side has the same one everywhere.
Type is set so large that the picture can be read at half a page's width. A bar is the geometric mean of the
cases that differ in size or rank alone; its line spans the least and the most of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import records
from bench.records import Document, Result

COLOURS = {
    "fastpeft": "#0072B2", "inplace": "#56B4E9", "peft": "#D55E00", "peft-compiled": "#E69F00",
    "torchtune": "#009E73", "loralib": "#F0E442", "plain": "#CC79A7", "frozen": "#000000",
    "full": "#D55E00", "lisa": "#0072B2", "badam": "#009E73", "ist": "#CC79A7", "topk": "#56B4E9",
}  # fmt: skip
OTHERS = ("#E69F00", "#F0E442", "#999999", "#56B4E9", "#CC79A7", "#009E73")
GROUP = ("model", "block", "case", "dtype")  # what bars are drawn apart for; size and rank are averaged
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # the line at 1 stays behind words
WIDTH = 7.0  # inches, at 12 points: half of it still has 6-point type


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar: several cases of one contender in one group."""

    group: str
    contender: str
    values: tuple[float, ...]
    floors: tuple[float, ...] = ()
    """The floor's ratio to the same peer, a case each."""

    @property
    def mean(self) -> float:
        """Geometric, as ratios are averaged."""
        return math.exp(sum(math.log(max(value, 1e-9)) for value in self.values) / len(self.values))


def bars(document: Document) -> tuple[list[Bar], list[Bar]]:
    """Bars of speed, and of bytes saved for backward (or the peak), each against the peer's."""
    speed: dict[tuple[str, str], list[float]] = {}
    size: dict[tuple[str, str], list[tuple[float, float | None]]] = {}
    for case, results in records.by_case(document).items():
        for name, result in results.items():
            key = (_group(case, result), name)
            ratio = records.speed_up(result, results)
            if ratio is not None:
                speed.setdefault(key, []).append(ratio.median)
            peer = results.get(records.peer_of(result)) or (result if name.startswith("peft-") else None)
            own, theirs = _bytes(result), peer and _bytes(peer)
            if own is not None and theirs:
                floor = _bytes(results.get(records.FLOOR))
                size.setdefault(key, []).append((own / theirs, None if floor is None else floor / theirs))
    return (
        [Bar(group=g, contender=c, values=tuple(found)) for (g, c), found in speed.items()],
        [Bar(group=g, contender=c, values=tuple(value for value, _ in found),
             floors=tuple(floor for _, floor in found if floor is not None))
         for (g, c), found in size.items()],
    )  # fmt: skip


def draw(document: Document, path: Path) -> list[Path]:
    """Write the picture as PNG and SVG beside each other; the paths, none where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = ("speed (more is faster)", "bytes (fewer are better)")
    panels = [(title, found) for title, found in zip(titles, bars(document), strict=True) if found]
    if not panels:
        return []
    heights = [len(found) + 0.9 * len({bar.group for bar in found}) + 1.5 for _, found in panels]
    with plt.rc_context({"font.size": 12, "svg.hashsalt": "bench"}):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(WIDTH, 0.33 * sum(heights)), squeeze=False,
            gridspec_kw={"height_ratios": heights}, layout="constrained",
        )  # fmt: skip
        for axis, (title, found) in zip(axes[:, 0], panels, strict=True):
            _panel(axis, title, found)
        written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
        for target in written:
            figure.savefig(target, dpi=200, metadata={"Date": None} if target.suffix == ".svg" else None)
        plt.close(figure)
    return written


def _panel(axis: Any, title: str, found: Sequence[Bar]) -> None:
    place = 0.0
    ticks, labels = [], []
    for group in dict.fromkeys(bar.group for bar in found):
        axis.annotate(group, (0, place), (5, 0), textcoords="offset points", weight="bold", va="center",
                      bbox=WHITE)  # fmt: skip
        for bar in (bar for bar in found if bar.group == group):
            place += 1
            axis.barh(place, bar.mean, 0.82, color=_colour(bar.contender), edgecolor="black", linewidth=0.5)
            if len(bar.values) > 1:
                axis.plot([min(bar.values), max(bar.values)], [place, place], color="black", linewidth=1.4)
            for floor in bar.floors[:1]:
                axis.plot([floor, floor], [place - 0.5, place + 0.5], color="black", linewidth=2.5)
            end = max(bar.mean, *bar.values, *bar.floors[:1])
            axis.annotate(f"{bar.mean:.2f}", (end, place), (6, 0), textcoords="offset points", va="center",
                          bbox=WHITE)  # fmt: skip
            ticks.append(place)
            labels.append(_side(bar.contender))
        place += 1.4
    axis.axvline(1.0, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axis.set_yticks(ticks, labels)
    axis.set_ylim(place - 0.8, -0.8)
    axis.set_xlim(0, 1.18 * max(max(*bar.values, *bar.floors, 1.0, bar.mean) for bar in found))
    marked = "; thick line: the frozen base" if any(bar.floors for bar in found) else ""
    axis.set_xlabel(f"{title}{marked}")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _group(case: records.Case, result: Result) -> str:
    words = [str(value) for key, value in case if key in GROUP]
    contender = records.contender_of(result)
    method = {"lora": "LoRA", "dora": "DoRA"}.get(records.method_of(contender), "")
    peer = _side(records.peer_of(result) or contender)
    return f"{', '.join(word for word in (*words, method) if word)} ({peer} = 1)"


def _side(contender: str) -> str:
    """Without the method, which the group names."""
    method = records.method_of(contender)
    return contender.replace(f"-{method}", "", 1) if method else contender


def _bytes(result: Result | None) -> float | None:
    if result is None:
        return None
    found = result.get("saved_bytes", result.get("peak_bytes"))
    return None if found is None else float(found)


def _colour(contender: str) -> str:
    side = _side(contender).split(",")[0].split()[0]
    return COLOURS.get(side) or OTHERS[sum(map(ord, side)) % len(OTHERS)]
