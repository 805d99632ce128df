"""What an optimiser's state tells of a rank allocation: whose it is, how far, and who has what left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpeft.errors import CheckpointError
from fastpeft.methods.adalora import AdaLoRA

KEY = "adalora"  # in the first parameter group, as a schedule's record is
VERSION = 1
# What of a configuration the allocation follows.
_SCHEDULE = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")
_SHOWN = 4


def static(config: AdaLoRA, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return what tells one training from another.

    Args:
        config: the schedule.
        ranks: of every layer at first, by path.
    """
    schedule = {name: getattr(config, name) for name in _SCHEDULE}
    return {"version": VERSION, "schedule": schedule, "ranks": dict(ranks)}


def read(groups: Any) -> dict[str, Any]:
    """Return the record in an optimiser's parameter groups.

    Raises:
        CheckpointError: there is none.
    """
    found = groups[0].get(KEY) if groups else None
    if not isinstance(found, Mapping) or found.get("version") != VERSION:
        raise CheckpointError(
            "the optimiser's state has no record of a rank allocation: it was saved without a RankAllocator"
        )
    return dict(found)


def compare(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse the state of another training.

    Raises:
        CheckpointError: it lists the differences.
    """
    lines = []
    for what in ("schedule", "ranks"):
        mine, theirs = expected[what], found.get(what) or {}
        lines += [
            f"{name}: {theirs.get(name)!r} in the state, {mine.get(name)!r} here"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        shown = "\n".join(f"- {line}" for line in [*lines[:_SHOWN], *more])
        raise CheckpointError(f"the rank allocation is of another training:\n{shown}")
