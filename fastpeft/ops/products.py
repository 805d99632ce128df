"""Inputs and results of the torch backend's forward and backward, whichever way it multiplies.

Two modules compute them: :mod:`fastpeft.ops.native` in the operands' dtype, :mod:`fastpeft.ops.blocked`
in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout:
    """Dropout of a layer's input.

    Attributes:
        p: probability of dropping an element.
        seed: [1] int64, of which the mask is drawn.
        on_base: whether DoRA's base product takes the dropped input too (PEFT's meaning).
    """

    p: float
    seed: Tensor
    on_base: bool = False


class RowScale(NamedTuple):
    """DoRA's row scale, and what is known of it (:func:`fastpeft.ops.row_norm.checked_row_scale`).

    Attributes:
        c: [out_features] in fp32 (fp64).
        is_quotient: every c is m / n itself, and no n is 0.
        is_one: every c is exactly 1: DoRA as it begins, whose output should be the base's to the bit.
        is_near: every c lies within 1/4 of 1, as it nearly always does (:mod:`fastpeft.ops.features`).
    """

    c: Tensor
    is_quotient: bool = False
    is_one: bool = False
    is_near: bool = False


class Forward(NamedTuple):
    """Results of a forward.

    Attributes:
        y: [tokens, out_features] in x's dtype.
        S: ``drop(x) A^T`` [tokens, r] in x's dtype.
        z: DoRA's product before the row scale, [tokens, out_features], where it was asked for.
    """

    y: Tensor
    S: Tensor
    z: Tensor | None = None


class Need(NamedTuple):
    """Which gradients a backward is asked for; ``dot`` is colsum(dY * kept), of which DoRA makes dm."""

    x: bool
    A: bool
    B: bool
    bias: bool
    dot: bool = False


@dataclass(kw_only=True, slots=True)
class Gradients:
    """Results of a backward: x in its own dtype; the others in it or in fp32 (fp64)."""

    x: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
    dot: Tensor | None = None
