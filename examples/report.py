"""What the user sees: lines, training progress, the loss plot."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import matplotlib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Plain progress lines, for a file or CI, come at every tenth of the steps.
PLAIN_LINES = 10
# The drawn line is an average over this share of the steps: single batches of 512 tokens are noisy.
SMOOTHING = 0.1


class Advance(Protocol):
    """Reports one finished step."""

    def __call__(self, loss: float, more: str = "") -> None: ...


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


@contextmanager
def progress(steps: int, per_step: int, unit: str = "tokens") -> Iterator[Advance]:
    """Show step, loss, `unit`/s and time left: a live bar on a terminal, a few lines elsewhere."""
    begin = time.perf_counter()
    done = 0
    if sys.stdout.isatty():
        bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=Console(),
        )
        task = bar.add_task("train", total=steps, state="")

        def live(loss: float, more: str = "") -> None:
            nonlocal done
            done += 1
            rate = done * per_step / (time.perf_counter() - begin)
            bar.update(task, advance=1, state=f"loss {loss:.3f}  {more}  {rate:.0f} {unit}/s  left")

        with bar:
            yield live
        return

    every = max(1, steps // PLAIN_LINES)

    def plain(loss: float, more: str = "") -> None:
        nonlocal done
        done += 1
        if done % every == 0 or done in (1, steps):
            seconds = time.perf_counter() - begin
            rate = done * per_step / seconds
            left = seconds / done * (steps - done)
            state = f"loss {loss:.3f}  {more}  " if more else f"loss {loss:.3f}  "
            say(f"  step {done}/{steps}  {state}{rate:.0f} {unit}/s  {left:.0f} s left")

    yield plain


def plot_losses(losses: list[float], title: str, path: Path) -> None:
    """Draw every step's loss and their running average into a PNG file."""
    matplotlib.use("Agg")  # draws into files; needs no display
    from matplotlib import pyplot  # after the choice of backend

    width = max(1, round(len(losses) * SMOOTHING))
    recent = [losses[max(0, i + 1 - width) : i + 1] for i in range(len(losses))]
    averages = [sum(window) / len(window) for window in recent]
    steps = range(1, len(losses) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="0.75", marker=".", label="each step")
    axes.plot(steps, averages, color="C0", linewidth=2, label=f"average of the last {width}")
    axes.set(title=title, xlabel="step", ylabel="training loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
