"""MI300: 64 KiB of LDS, MFMA.

A lane mask takes two scalar registers here: more than 16 masked or dropped-out elements a thread spill
those.
"""

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
    RANK_R_GEMM: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    RANK_R_GEMM_DROPOUT: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    DOWN_PROJECTION: (down(64, 32, 32, 4, 2), down(64, 32, 128, 8, 2)),
    GRAD_S_B: (grad(16, 256, 16, 8, 2), grad(32, 128, 32, 8, 2)),
    GRAD_A: (grad(64, 64, 32, 4, 2), grad(32, 128, 128, 8, 2)),
    RANK_R_GEMM_DORA: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    RANK_R_GEMM_DORA_BACKWARD: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 32, 64, 4, 2)),
    RANK_R_GEMM_DORA_DROPOUT: (gemm(128, 64, 64, 64, 8, 2), gemm(64, 64, 64, 64, 8, 2)),
    GRAD_S_B_DORA: (grad(32, 128, 32, 8, 2),),
    ROW_NORM: (down(32, 64, 64, 4, 2), down(16, 64, 64, 4, 2), down(16, 64, 128, 8, 2)),
    SINGLE: (gemm(128, 128, 32, 64, 8, 2), gemm(64, 64, 32, 64, 4, 2)),
    SINGLE_NORM: (gemm(64, 128, 32, 64, 8, 2),),
    DECODE: (gemm(16, 64, 64, 64, 4, 2),),
    EXPAND: (gemm(64, 64, 0, 32, 8, 1),),
    RANK_R_GEMM_DORA_Z: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    RANK_R_GEMM_DORA_DROPOUT_BACKWARD: (gemm(128, 64, 64, 64, 8, 2), gemm(64, 64, 32, 64, 4, 2)),
    RANK_R_GEMM_TMA: (),
    STACKED_DOWN: (down(64, 64, 32, 4, 2), down(32, 64, 64, 4, 2)),
    STACKED_GEMM: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    STACKED_DX: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    STACKED_DX_DROPOUT: (gemm(64, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 8, 2)),
    STACKED_GRAD: (grad(64, 64, 64, 4, 2),),
    GLU_GEMM: (gemm(128, 64, 64, 64, 8, 2), gemm(64, 64, 64, 64, 8, 2)),
    GLU_BACKWARD: (gemm(128, 64, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    GLU_BACKWARD_DROPOUT: (gemm(128, 64, 64, 64, 8, 2), gemm(64, 64, 64, 64, 8, 2)),
}
