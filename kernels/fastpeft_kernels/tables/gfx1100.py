"""RX 7000, and the parent of RX 9000: 64 KiB of LDS, WMMA, 32 lanes a wavefront."""

from __future__ import annotations

from ..kernel_names import (
    GLU_BACKWARD,
    GLU_BACKWARD_DROPOUT,
    GLU_GEMM,
    GRAD_S_B,
    GRAD_S_B_DORA,
    RANK_R_GEMM,
    RANK_R_GEMM_DORA,
    RANK_R_GEMM_DORA_BACKWARD,
    RANK_R_GEMM_DORA_DROPOUT,
    RANK_R_GEMM_DORA_DROPOUT_BACKWARD,
    RANK_R_GEMM_DORA_Z,
    RANK_R_GEMM_DROPOUT,
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
from . import gfx942

TABLE: Table = {
    **gfx942.TABLE,
    RANK_R_GEMM: (gemm(128, 128, 32, 64, 8, 2), gemm(64, 64, 32, 64, 4, 2)),
    RANK_R_GEMM_DROPOUT: (gemm(64, 128, 32, 64, 8, 2), gemm(64, 64, 32, 64, 8, 2)),
    RANK_R_GEMM_DORA: (gemm(128, 128, 32, 64, 8, 2), gemm(64, 64, 32, 64, 4, 2)),
    RANK_R_GEMM_DORA_Z: (gemm(128, 128, 32, 64, 8, 2), gemm(64, 64, 32, 64, 4, 2)),
    RANK_R_GEMM_DORA_BACKWARD: (gemm(128, 128, 32, 64, 8, 2), gemm(64, 64, 32, 64, 4, 2)),
    RANK_R_GEMM_DORA_DROPOUT: (gemm(64, 64, 32, 64, 8, 2),),
    RANK_R_GEMM_DORA_DROPOUT_BACKWARD: (gemm(64, 64, 32, 64, 8, 2),),
    GRAD_S_B: (grad(32, 128, 32, 8, 2),),
    GRAD_S_B_DORA: (grad(32, 128, 16, 8, 2),),
    ROW_NORM: (down(32, 32, 32, 4, 2),),
    SINGLE: (gemm(64, 128, 32, 64, 8, 2), gemm(64, 64, 32, 64, 4, 2)),
    SINGLE_NORM: (gemm(64, 64, 32, 64, 8, 2),),
    STACKED_DOWN: (down(64, 64, 16, 8, 2), down(32, 32, 64, 8, 2)),
    STACKED_GEMM: (gemm(64, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 8, 2)),
    STACKED_DX: (gemm(64, 64, 64, 64, 8, 2),),
    STACKED_DX_DROPOUT: (gemm(64, 64, 32, 32, 8, 2),),
    STACKED_GRAD: (grad(64, 32, 16, 4, 2), grad(32, 64, 32, 4, 2), grad(32, 64, 64, 8, 2)),
    GLU_GEMM: (gemm(64, 64, 32, 64, 8, 2),),
    GLU_BACKWARD: (gemm(64, 128, 32, 32, 8, 2), gemm(64, 64, 64, 64, 8, 2)),
    GLU_BACKWARD_DROPOUT: (gemm(64, 128, 32, 32, 8, 2), gemm(64, 64, 64, 64, 8, 2)),
}
