"""What ``patch`` did to each module, or why it did nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["patched", "trained", "skipped", "accelerated", "left to PEFT"]


@dataclass(frozen=True)
class ModuleReport:
    """One module: its path, what was done, and the details or the reason."""

    path: str
    action: Action
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.action}, {self.detail}"


@dataclass(frozen=True)
class PatchReport:
    """Everything :func:`fastpeft.patch` did to one model, and what runs it; ``str()`` gives a line for each.

    Attributes:
        modules: one entry per linear module, per module trained whole, and per bias that BitFit trains.
        trainable_parameters: elements that require gradients after the patch.
        total_parameters: elements of the model, the adapter's included.
        unmatched: entries of ``target_modules`` that named nothing (only where PEFT's rule allows it).
        backend: which backend runs where the model is now, or why the one that was asked for cannot.
        kernels: the choices between kernels that this process has measured or found in its file, each with
            the candidates' times relative to the winner's; empty off a GPU.
        calls: of a PEFT model accelerated in place: how many calls of its layers went which way. ``fused``:
            base product and adapter in one op; ``added``: our update on the base's own product; ``base``:
            nothing to add (merged, disabled); ``peft``: PEFT's own forward.
        blocks: linears that are computed together, and what was left alone though it looks like a block.
        reasons: why calls went PEFT's way, with their number.
    """

    modules: tuple[ModuleReport, ...]
    trainable_parameters: int
    total_parameters: int
    unmatched: tuple[str, ...] = ()
    backend: str = ""
    kernels: tuple[str, ...] = ()
    calls: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    @property
    def patched(self) -> tuple[str, ...]:
        """Paths of the modules that carry an adapter computed by fastpeft."""
        return tuple(module.path for module in self.modules if module.action in ("patched", "accelerated"))

    def summary(self) -> str:
        """Return one line: counts, and the share of parameters that train."""
        counts = Counter(module.action for module in self.modules)
        share = 100.0 * self.trainable_parameters / max(self.total_parameters, 1)
        done = f"{counts['patched']} modules patched, {counts['skipped']} linears left as they were"
        if not counts["patched"] and counts["trained"]:
            done = f"{counts['trained']} modules train, in whole or in part"
        if counts["accelerated"] or counts["left to PEFT"]:
            done = f"{counts['accelerated']} PEFT modules accelerated, {counts['left to PEFT']} left to PEFT"
        line = (
            f"{done}; {self.trainable_parameters:,} of {self.total_parameters:,} parameters train "
            f"({share:.2f}%)"
        )
        return line + (f"; matched nothing: {', '.join(self.unmatched)}" if self.unmatched else "")

    def __str__(self) -> str:
        lines = [str(module) for module in self.modules]
        lines += [f"block {block}" for block in self.blocks]
        lines += [f"backend: {self.backend}"] if self.backend else []
        lines += [f"kernels: {choice}" for choice in self.kernels]
        if self.calls:
            lines.append("calls: " + ", ".join(f"{way} {count:,}" for way, count in self.calls.items()))
        lines += [f"PEFT's own forward, {count:,} times: {why}" for why, count in self.reasons.items()]
        return "\n".join([*lines, self.summary()])
