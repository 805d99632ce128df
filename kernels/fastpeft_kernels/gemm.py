"""The GEMM with the rank-r epilogue, by plain loads or by TMA where that serves."""

from __future__ import annotations

from torch import Tensor

from . import rank_r_gemm_tma
from .primitives import RowScale
from .rank_r_gemm import rank_r_gemm


def serves_tma(p: Tensor, q: Tensor, rank: int, *, keep_z: bool = False) -> bool:
    """Whether `gemm(p [M, K], q [K, N], ...)` of that rank can go by TMA on p's device."""
    return rank_r_gemm_tma.select(p, q, rank, keep_z=keep_z) is not None


def gemm(
    p: Tensor,
    q: Tensor,
    low: Tensor,
    r: Tensor,
    bias: Tensor | None,
    scale: float,
    *,
    row_scale: RowScale | None = None,
    keep_z: bool = False,
    tma: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`z = p q + scale * low r`, `out = c * z + bias`; `(out, z or None)`. Arguments as `rank_r_gemm`'s.

    With `tma`, by TMA where :func:`serves_tma` says so; by plain loads otherwise.
    """
    config = rank_r_gemm_tma.select(p, q, low.shape[1], keep_z=keep_z) if tma else None
    if config is None:
        return rank_r_gemm(p, q, low, r, bias, scale, scale_columns=row_scale, keep_z=keep_z)
    return rank_r_gemm_tma.rank_r_gemm_tma(
        p, q, low, r, bias, scale, config, scale_columns=row_scale, keep_z=keep_z
    )
