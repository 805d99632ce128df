"""RTX 30, and the parent of RTX 40 and 50: 99 KiB of shared memory a block, mma.sync."""

from __future__ import annotations

from ..kernel_names import RANK_R_GEMM, RANK_R_GEMM_DROPOUT
from ..tile import Table, gemm
from . import sm_80

TABLE: Table = {
    **sm_80.TABLE,
    RANK_R_GEMM: (
        gemm(128, 128, 32, 64, 8, 2),
        gemm(64, 128, 32, 64, 4, 3),
        gemm(64, 64, 64, 64, 4, 3),
    ),
    RANK_R_GEMM_DROPOUT: (gemm(128, 128, 32, 64, 8, 3), gemm(64, 64, 64, 64, 4, 3)),
}
