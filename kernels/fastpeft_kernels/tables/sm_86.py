"""RTX 30, and the parent of RTX 40 and 50: 99 KiB of shared memory a block, mma.sync."""

from __future__ import annotations

from ..kernel_names import (
    DECODE,
    GLU_BACKWARD,
    GLU_BACKWARD_DROPOUT,
    GLU_GEMM,
    RANK_R_GEMM,
    RANK_R_GEMM_DROPOUT,
    ROW_NORM,
    SINGLE,
    SINGLE_NORM,
    STACKED_DOWN,
    STACKED_DX,
    STACKED_DX_DROPOUT,
    STACKED_GEMM,
)
from ..tile import Table, down, gemm
from . import sm_80

TABLE: Table = {
    **sm_80.TABLE,
    RANK_R_GEMM: (
        gemm(128, 128, 32, 64, 8, 2),
        gemm(64, 128, 32, 64, 4, 3),
        gemm(64, 64, 64, 64, 4, 3),
    ),
    RANK_R_GEMM_DROPOUT: (gemm(128, 128, 32, 64, 8, 3), gemm(64, 64, 64, 64, 4, 3)),
    # At r = 64 sm_80's three stages spill 8 bytes of the second row, two stages none.
    ROW_NORM: (sm_80.TABLE[ROW_NORM][0], down(16, 64, 64, 4, 2), sm_80.TABLE[ROW_NORM][2]),
    SINGLE: (gemm(128, 128, 32, 64, 8, 2), gemm(64, 128, 32, 64, 8, 3), gemm(64, 64, 32, 64, 4, 3)),
    SINGLE_NORM: (gemm(128, 128, 32, 64, 8, 2), gemm(64, 64, 32, 64, 4, 3)),
    DECODE: (gemm(16, 64, 64, 64, 4, 3),),
    STACKED_DOWN: (down(64, 64, 16, 8, 3), down(32, 32, 32, 4, 3)),
    STACKED_GEMM: (gemm(128, 128, 32, 64, 8, 3), gemm(64, 64, 64, 64, 4, 3)),
    STACKED_DX: (gemm(128, 128, 32, 64, 8, 3), gemm(64, 64, 64, 64, 4, 3)),
    STACKED_DX_DROPOUT: (gemm(128, 128, 32, 64, 8, 3), gemm(64, 64, 64, 64, 4, 3)),
    GLU_GEMM: (gemm(128, 64, 32, 64, 8, 3), gemm(64, 64, 32, 64, 8, 3)),
    GLU_BACKWARD: (gemm(128, 128, 32, 64, 8, 3), gemm(64, 64, 64, 64, 8, 3)),
    GLU_BACKWARD_DROPOUT: (gemm(128, 128, 32, 64, 8, 3), gemm(64, 64, 64, 64, 8, 3)),
}
