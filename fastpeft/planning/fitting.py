"""The largest batch, sequence, rank or number of layers that fits: by bisection between two plans."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol, TypeVar

from fastpeft.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_MOST = 2**30


class HasPeak(Protocol):
    """What is bisected over."""

    @property
    def peak(self) -> int:
        """Bytes."""


P = TypeVar("P", bound=HasPeak)


def parse_bytes(size: int | str) -> int:
    """Return a size in bytes: a number, or a text such as ``24GiB`` or ``80GB``.

    Raises:
        ConfigError: it is no size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (count := int(float(match[1]) * unit)) < 1:
        raise ConfigError(f"expected a size such as 24GiB or 80GB, got {size!r}")
    return count


def largest_that_fits(plan_at: Callable[[int], P], limit: int, name: str, bound: int | None = None) -> P:
    """Return the plan of the largest value whose peak is within the limit.

    Memory grows with each of these numbers, and nearly as a straight line: so between the largest value known
    to fit and the smallest known not to, the next one tried is where the line through their peaks meets the
    limit, and every other time the middle.

    Args:
        plan_at: makes the plan for a value.
        limit: in bytes.
        name: of the number, for the error.
        bound: the largest value that makes sense, if there is one.

    Raises:
        ConfigError: not even 1 fits.
    """
    most = _MOST if bound is None else bound
    fits = plan_at(1)
    if fits.peak > limit:
        raise ConfigError(
            f"nothing fits: {name} 1 needs {fits.peak / 2**30:.2f} GiB, there are {limit / 2**30:.2f} GiB"
        )
    low, step = 1, 1
    over: P | None = None
    high = most + 1
    while low < most:
        value = min(low + step, most)
        found = plan_at(value)
        if found.peak > limit:
            high, over = value, found
            break
        slope = (found.peak - fits.peak) / (value - low)
        low, fits = value, found
        # Where the line meets the limit, and a little further, so that it lies in between.
        guess = int((limit - fits.peak) / slope * 1.02) + 1 if slope > 0 else 4 * low
        step = max(1, min(guess, 64 * low))
    by_line = True
    while high - low > 1:
        middle = (low + high) // 2
        if by_line and over is not None and over.peak > fits.peak:
            share = (limit - fits.peak) / (over.peak - fits.peak)
            middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        by_line = not by_line
        found = plan_at(middle)
        if found.peak <= limit:
            low, fits = middle, found
        else:
            high, over = middle, found
    return fits
