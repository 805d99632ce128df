"""The papers' figures of what the instruments found; matplotlib is needed here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpeft.errors import ConfigError
from fastpeft.instruments.directions import Change, correlation
from fastpeft.instruments.removal import Removal

_DPI = 120


def plot_weight_norms(norms: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Draw mean weight norms by layer, a line for each method: LISA's figure 2.

    Short trainings hardly move a norm. So beside them, where there are several methods, is how far each lies
    from the first one's.

    Args:
        norms: by method, what :meth:`WeightNorms.mean` returned.
        path: of the picture, its format by its ending.

    Raises:
        ConfigError: matplotlib is missing, or there is nothing to draw.
    """
    figure = _figure(norms, width=8.0)
    names = list(dict.fromkeys(layer for found in norms.values() for layer in found))
    first = next(iter(norms.values()))
    panels = figure.subplots(2 if len(norms) > 1 else 1, sharex=True, squeeze=False)[:, 0]
    for method, found in norms.items():
        places = [i for i, name in enumerate(names) if name in found]
        line = {"marker": "o", "markersize": 3, "label": method}
        panels[0].plot(places, [found[names[i]] for i in places], **line)
        if len(panels) > 1:
            shared = [i for i in places if names[i] in first]
            apart = [100 * (found[names[i]] / first[names[i]] - 1) for i in shared]
            panels[1].plot(shared, apart, **line)
            panels[1].set_ylabel(f"from {next(iter(norms))}'s, %")
    panels[-1].set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, fontsize=7)
    panels[-1].set_xlabel("layer")
    panels[0].set(ylabel="mean weight norm", yscale="log")
    panels[0].legend()
    figure.savefig(path, dpi=_DPI)


def plot_changes(changes: Mapping[str, Sequence[Change]], path: str | Path) -> None:
    """Draw dM against dD, a panel for each method with its correlation: DoRA's figure 2.

    Args:
        changes: by method, changes of one kind of weight over layers (and, if wished, training steps).
        path: of the picture.

    Raises:
        ConfigError: as for :func:`plot_weight_norms`, or a method's changes are all alike.
    """
    figure = _figure(changes, width=4.0 * len(changes))
    panels = figure.subplots(1, len(changes), squeeze=False)[0]
    for panel, (method, found) in zip(panels, changes.items(), strict=True):
        r = correlation(found)
        layers = [-1 if change.layer is None else change.layer for change in found]
        x = [change.direction for change in found]
        dots = panel.scatter(x, [change.magnitude for change in found], c=layers, cmap="viridis", s=14)
        figure.colorbar(dots, ax=panel, label="layer")
        panel.set(xlabel="ΔD (direction)", ylabel="ΔM (magnitude)")
        panel.set_title(f"{method}, correlation {r:+.2f}", y=1.0, pad=14)  # above the axis' power of ten
        panel.margins(0.1)
        panel.locator_params(nbins=4)
        panel.ticklabel_format(scilimits=(-2, 3))
    figure.savefig(path, dpi=_DPI)


def plot_removal(curves: Mapping[str, Removal], path: str | Path) -> None:
    """Draw the loss against how many blocks' adapters are gone, a line for each order: IST's figure 2.

    Args:
        curves: by name, such as ``"greedy"`` and ``"random"``.
        path: of the picture.

    Raises:
        ConfigError: as for :func:`plot_weight_norms`.
    """
    figure = _figure(curves, width=6.0)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(range(len(curve.losses)), curve.losses, marker="o", markersize=3, label=name)
    axes.set(xlabel="blocks whose adapters are gone", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=_DPI)


def _figure(drawn: Mapping[str, Any], width: float) -> Any:
    if not drawn or not all(drawn.values()):
        raise ConfigError("there is nothing to draw: expected something measured for each name")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib: pip install matplotlib") from None
    # Not pyplot's: no window, and no state that outlives the picture.
    return Figure(figsize=(width, 4.0), layout="constrained")


def _short(name: str) -> str:
    """A block's number, or the last part of a path."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return numbers[0] if numbers else parts[-1]
