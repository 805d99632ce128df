"""Triton's interpreter, which runs a tile in numpy.

Tiles are small so that tiny test shapes still span several of them, several rank tiles and several groups."""

from __future__ import annotations

from ..kernel_names import DOWN_PROJECTION, GRAD_A, GRAD_S_B, RANK_R_GEMM, RANK_R_GEMM_DROPOUT
from ..tile import Table, down, gemm, grad

TABLE: Table = {
    RANK_R_GEMM: (gemm(32, 32, 32, 32, 4, 1), gemm(16, 16, 16, 32, 4, 1)),
    RANK_R_GEMM_DROPOUT: (gemm(32, 32, 32, 32, 4, 1),),
    DOWN_PROJECTION: (down(32, 16, 32, 4, 1),),
    GRAD_S_B: (grad(16, 32, 32, 4, 1),),
    GRAD_A: (grad(16, 32, 32, 4, 1),),
}
