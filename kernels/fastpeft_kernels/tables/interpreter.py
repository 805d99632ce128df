"""Triton's interpreter, which runs a tile in numpy.

Tiles are small so that tiny test shapes still span several of them, several rank tiles and several groups."""

from __future__ import annotations

from ..kernel_names import (
    DECODE,
    DOWN_PROJECTION,
    EXPAND,
    GLU_BACKWARD,
    GLU_BACKWARD_DROPOUT,
    GLU_GEMM,
    GRAD_A,
    GRAD_S_B,
    GRAD_S_B_DORA,
    RANK_R_GEMM,
    RANK_R_GEMM_DORA,
    RANK_R_GEMM_DORA_BACKWARD,
    RANK_R_GEMM_DORA_DROPOUT,
    RANK_R_GEMM_DORA_DROPOUT_BACKWARD,
    RANK_R_GEMM_DORA_Z,
    RANK_R_GEMM_DROPOUT,
    RANK_R_GEMM_TMA,
    ROW_NORM,
    SINGLE,
    SINGLE_NORM,
    STACKED_DOWN,
    STACKED_DX,
    STACKED_DX_DROPOUT,
    STACKED_GEMM,
    STACKED_GRAD,
)
from ..tile import Table, down, gemm, grad

TABLE: Table = {
    RANK_R_GEMM: (gemm(32, 32, 32, 32, 4, 1), gemm(16, 16, 16, 32, 4, 1)),
    RANK_R_GEMM_DROPOUT: (gemm(32, 32, 32, 32, 4, 1),),
    DOWN_PROJECTION: (down(32, 16, 32, 4, 1),),
    GRAD_S_B: (grad(16, 32, 32, 4, 1),),
    GRAD_A: (grad(16, 32, 32, 4, 1),),
    RANK_R_GEMM_DORA: (gemm(32, 32, 32, 32, 4, 1), gemm(16, 16, 16, 32, 4, 1)),
    RANK_R_GEMM_DORA_BACKWARD: (gemm(32, 32, 32, 32, 4, 1),),
    RANK_R_GEMM_DORA_DROPOUT: (gemm(32, 32, 32, 32, 4, 1),),
    GRAD_S_B_DORA: (grad(16, 32, 32, 4, 1),),
    ROW_NORM: (down(16, 16, 32, 4, 1),),
    SINGLE: (gemm(32, 32, 32, 64, 4, 1), gemm(16, 16, 16, 64, 4, 1)),
    SINGLE_NORM: (gemm(16, 32, 16, 64, 4, 1),),
    DECODE: (gemm(16, 32, 16, 64, 4, 1),),
    EXPAND: (gemm(32, 16, 0, 16, 4, 1),),
    RANK_R_GEMM_DORA_Z: (gemm(32, 32, 32, 32, 4, 1),),
    RANK_R_GEMM_DORA_DROPOUT_BACKWARD: (gemm(32, 32, 32, 32, 4, 1),),
    RANK_R_GEMM_TMA: (gemm(32, 32, 32, 32, 4, 1),),
    STACKED_DOWN: (down(32, 16, 32, 4, 1),),
    STACKED_GEMM: (gemm(32, 32, 32, 32, 4, 1), gemm(16, 16, 16, 32, 4, 1)),
    STACKED_DX: (gemm(16, 64, 16, 32, 4, 1),),
    STACKED_DX_DROPOUT: (gemm(16, 64, 16, 32, 4, 1),),
    STACKED_GRAD: (grad(16, 32, 32, 4, 1),),
    GLU_GEMM: (gemm(16, 64, 16, 32, 4, 1),),
    GLU_BACKWARD: (gemm(16, 64, 16, 32, 4, 1),),
    GLU_BACKWARD_DROPOUT: (gemm(16, 64, 16, 32, 4, 1),),
}
