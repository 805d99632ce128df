"""What ``patch`` did to each module, or why it did nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Action = Literal["patched", "trained", "skipped"]


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
    """Everything :func:`fastpeft.patch` did to one model; ``str()`` gives a line per module.

    Attributes:
        modules: one entry per linear module, and per module trained whole.
        trainable_parameters: elements that require gradients after the patch.
        total_parameters: elements of the model, the adapter's included.
        unmatched: entries of ``target_modules`` that named nothing (only where PEFT's rule allows it).
    """

    modules: tuple[ModuleReport, ...]
    trainable_parameters: int
    total_parameters: int
    unmatched: tuple[str, ...] = ()

    @property
    def patched(self) -> tuple[str, ...]:
        """Paths of the modules that carry an adapter."""
        return tuple(module.path for module in self.modules if module.action == "patched")

    def summary(self) -> str:
        """Return one line: counts, and the share of parameters that train."""
        counts = Counter(module.action for module in self.modules)
        share = 100.0 * self.trainable_parameters / max(self.total_parameters, 1)
        line = (
            f"{counts['patched']} modules patched, {counts['skipped']} linears left as they were; "
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.2f}%)"
        )
        return line + (f"; matched nothing: {', '.join(self.unmatched)}" if self.unmatched else "")

    def __str__(self) -> str:
        return "\n".join([*(str(module) for module in self.modules), self.summary()])
