"""Tile sizes as data: one table an architecture, rows for every kernel.

A row is here if it compiles without register spills and within the shared memory a block may use; `python -m
bench codegen` checks that without a GPU, in CI for every kernel's default cases on every target. Rows of a
GEMM run from the largest tile to the smallest; rows of the others from the smallest rank tile to the largest.
"""

from __future__ import annotations

from ..tile import Table
from . import fp32, gfx942, gfx1100, interpreter, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, unaligned

TABLES: dict[str, Table] = {
    "sm_80": sm_80.TABLE,
    "sm_86": sm_86.TABLE,
    "sm_89": sm_89.TABLE,
    "sm_90": sm_90.TABLE,
    "sm_100": sm_100.TABLE,
    "sm_120": sm_120.TABLE,
    "gfx942": gfx942.TABLE,
    "gfx1100": gfx1100.TABLE,
    "fp32": fp32.TABLE,
    "unaligned": unaligned.TABLE,
    "interpreter": interpreter.TABLE,
}
