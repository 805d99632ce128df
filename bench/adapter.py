"""The adapter that all contenders of a comparison are asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What all sides are asked for; everything else stays at their defaults."""

    rank: int
    """Rank r of the adapters."""
    dora: bool
    """DoRA instead of LoRA."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""

    @property
    def alpha(self) -> int:
        """Twice the rank: a scaling of 2, because a scaling of 1 could be skipped by one side."""
        return 2 * self.rank

    @property
    def method(self) -> str:
        """`lora` or `dora`."""
        return "dora" if self.dora else "lora"
