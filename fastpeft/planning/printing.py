"""A plan as text, and several side by side: plain lines, or rich's tables where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastpeft.planning.step import KINDS, PHASES

if TYPE_CHECKING:
    from fastpeft.planning.plan import MemoryPlan

LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer_state": "optimiser state",
    "activations": "activations",
    "caches": "kept by layers",
    "temporaries": "temporaries",
}
_SHORT = {**LABELS, "optimizer_state": "state", "temporaries": "temp."}


def gib(size: int) -> str:
    """Return a size in GiB with two decimals, smaller ones in MiB or KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit or (name == "KiB" and size):
            return f"{size / unit:.2f} {name}"
    return "0"


def heading(plan: MemoryPlan) -> str:
    """Return what the plan is for, in one line."""
    s = plan.setting
    dtype = str(s.dtype).removeprefix("torch.")
    checkpointing = ", activation checkpointing" if s.checkpointing else ""
    return (
        f"{s.model} ({s.parameters / 1e9:.3g}B parameters, {s.trainable / 1e6:,.6g}M of them may train), "
        f"{s.batch}x{s.sequence} tokens, {dtype}, {s.optimizer}{checkpointing}, on {s.device}"
    )


def where(plan: MemoryPlan) -> str:
    """Return in which part of the step the peak is."""
    layer = plan.peak_layer or ("the loss" if plan.peak_phase != "optimizer" else "")
    return plan.peak_phase + (f", at {layer}" if layer else "")


def text(plan: MemoryPlan, *, per_layer: bool = False) -> str:
    """Return a plan as lines of plain text."""
    lines = [f"{plan.setting.method}: {heading(plan)}"]
    if plan.setting.active_blocks is not None:
        count = len(plan.setting.active_blocks)
        names = ", ".join(plan.setting.active_blocks[:4]) + (", ..." if count > 4 else "")
        lines.append(f"the most expensive blocks to train: {names}")
    for kind, label in LABELS.items():
        size = plan.temporaries if kind == "temporaries" else getattr(plan, kind)
        at_peak = f"{gib(plan.at_peak[kind]):>12} at the peak"
        lines.append(f"  {label:<16}{gib(size):>12}{at_peak}")
    phases = ", ".join(f"{phase} {gib(plan.peaks[phase])}" for phase in PHASES)
    lines.append(f"  {'peak':<16}{gib(plan.peak):>12}  in {where(plan)}")
    lines.append(f"  peaks: {phases}")
    if per_layer:
        lines.append("  ".join(["", f"{'':<28}", *(f"{_SHORT[kind]:>14}" for kind in KINDS)]))
        for path, found in plan.layers.items():
            sizes = [f"{gib(found.get(kind, 0)):>14}" for kind in KINDS]
            lines.append("  ".join(["", f"{path or '(outside, the loss)':<28}", *sizes]))
    return "\n".join(lines)


def table(plans: Sequence[MemoryPlan]) -> str:
    """Return methods side by side, a line each."""
    columns = [*KINDS, "peak"]
    names = {**_SHORT, "peak": "peak"}
    width = max(len(plan.setting.method) for plan in plans)
    lines = [f"{'method':<{width}}  " + "  ".join(f"{names[c]:>14}" for c in columns) + "  in"]
    for plan in plans:
        sizes = "  ".join(f"{gib(getattr(plan, column)):>14}" for column in columns)
        lines.append(f"{plan.setting.method:<{width}}  {sizes}  {plan.peak_phase}")
    return "\n".join(lines)


def show(plans: Sequence[MemoryPlan], *, per_layer: bool) -> None:
    """Print one plan with its parts, or several side by side."""
    if len(plans) == 1:
        print(text(plans[0], per_layer=per_layer))
        return
    print(heading(plans[0]).replace(_trained(plans[0]), ""))
    if not (sys.stdout.isatty() and _rich_table(plans)):
        print(table(plans))
    if per_layer:
        for plan in plans:
            print("\n" + text(plan, per_layer=True))


def _trained(plan: MemoryPlan) -> str:
    """The part of the heading that differs between methods."""
    return f", {plan.setting.trainable / 1e6:,.6g}M of them may train"


def _rich_table(plans: Sequence[MemoryPlan]) -> bool:
    """Print the table by rich on a terminal; False where it is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    grid = Table()
    columns = [*KINDS, "peak"]
    grid.add_column("method")
    for column in columns:
        grid.add_column({**_SHORT, "peak": "peak"}[column], justify="right")
    grid.add_column("peak is in")
    for plan in plans:
        sizes = [gib(getattr(plan, column)) for column in columns]
        grid.add_row(plan.setting.method, *sizes[:-1], f"[bold]{sizes[-1]}[/bold]", plan.peak_phase)
    Console(highlight=False).print(grid)
    return True
