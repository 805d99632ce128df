"""The table and the picture of `classify.py`'s results."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.table import Table

from entries import ENTRIES
from report import say

MIB = 2**20
FAR = 5  # points below the linear probe


def show(found: dict[str, Any]) -> int:
    """Print the table; return the exit code 0."""
    settings, seconds = found["settings"], found.get("seconds", {}).get("step", {})
    held_out, probed = settings["held_out"], found["probe"]
    table = Table(
        title=f"{settings['model']} on {settings['data']}: {settings['train']:,} rows, "
        f"{settings['steps']} steps of {settings['batch']}, "
        f"{held_out:,} held out, {settings['threads']} thread(s)"
    )
    for column in ("method", "rate", "trained", "peak MiB", "ms a step", "accuracy, %", "loss", "seeds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    notes = []
    for name, entry in ENTRIES.items():
        runs, held = list(found.get("runs", {}).get(name, {}).values()), found.get("memory", {}).get(name)
        if not entry.rates:
            accuracy, loss = f"{100 * probed['accuracy']:.1f}", f"{probed['loss']:.3f}"
            table.add_row(entry.label, "", f"{probed['trained']:,}", "", "", accuracy, loss, "")
        elif reason := found.get("refused", {}).get(name):
            table.add_row(entry.label, *[""] * 4, "not possible", "", "")
            notes.append(f"{entry.label}: {reason}")
        elif runs and held:
            table.add_row(
                entry.label,
                f"{found['rate'][name]:g}",
                f"{held['trained']:,}",
                f"{held['peak'] / MIB:.0f}",
                f"{1000 * seconds[name]:.0f}" if name in seconds else "",
                _spread([100 * run["accuracy"] for run in runs], 1),
                _spread([run["loss"] for run in runs], 3),
                str(len(runs)),
            )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    error = 100 * math.sqrt(probed["accuracy"] * (1 - probed["accuracy"]) / held_out)
    say(f"± is the standard deviation over seeds; {held_out:,} rows alone leave one of {error:.1f} points")
    say("peak: of all tensors alive in a training step, weights and moments included")
    say("trained: parameters that may train, the head's included; with a schedule some of them at a time")
    if not seconds:
        say("ms a step: not measured yet (--times, on an idle machine)")
    for note in notes:
        say(note)
    return 0


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy of every method, in the order of what trains, into a PNG file.

    A method far below the others is said at the edge, so that the others can be told apart.
    """
    matplotlib.use("Agg")  # draws into files; needs no display
    from matplotlib import pyplot  # after the choice of backend

    trained = {name: found["memory"][name]["trained"] for name in found.get("runs", {})}
    names = sorted(trained, key=lambda name: trained[name], reverse=True)
    values = {n: [100 * run["accuracy"] for run in found["runs"][n].values()] for n in names}
    means = {name: statistics.mean(of_one) for name, of_one in values.items()}
    probed = 100 * found["probe"]["accuracy"]
    edge = min([probed, *(mean for mean in means.values() if mean > probed - FAR)]) - 2
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.28 * len(names)), layout="constrained")
    axes.axvline(probed, color="0.6", linestyle="--", label="linear probe")
    for place, name in enumerate(names):
        if means[name] < edge:
            axes.annotate(f"\N{LEFTWARDS ARROW} {means[name]:.1f}", (edge, place), va="center", fontsize=8)
            continue
        axes.scatter(values[name], [place] * len(values[name]), color="0.7", s=12)
        spread = statistics.stdev(values[name]) if len(values[name]) > 1 else 0.0
        axes.errorbar([means[name]], [place], xerr=[spread], fmt="o", capsize=3, color="C0")
    labels = [f"{ENTRIES[name].label}  ({trained[name]:,})" for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set(xlabel="held-out accuracy, %, of each seed, mean and deviation", ylabel="parameters that train")
    axes.set_xlim(left=edge)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
