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
    """Accuracy against the parameters that train, into a PNG file."""
    matplotlib.use("Agg")  # draws into files; needs no display
    from matplotlib import pyplot  # after the choice of backend

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.axhline(100 * found["probe"]["accuracy"], color="0.6", linestyle="--", label="linear probe")
    for name, runs in found.get("runs", {}).items():
        values = [100 * run["accuracy"] for run in runs.values()]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        x, y = found["memory"][name]["trained"], statistics.mean(values)
        axes.errorbar([x], [y], yerr=[spread], fmt="o", capsize=3)
        axes.annotate(ENTRIES[name].label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="parameters that train", ylabel="held-out accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
