"""H100, H200: 227 KiB of shared memory a block, wgmma."""

from __future__ import annotations

from ..kernel_names import DOWN_PROJECTION, GRAD_A, GRAD_S_B, RANK_R_GEMM, RANK_R_GEMM_DROPOUT
from ..tile import Table, down, gemm, grad

TABLE: Table = {
    RANK_R_GEMM: (
        gemm(128, 256, 64, 64, 8, 3),
        gemm(128, 128, 64, 128, 8, 3),
        gemm(64, 128, 64, 64, 4, 4),
        gemm(64, 64, 64, 64, 4, 4),
    ),
    RANK_R_GEMM_DROPOUT: (gemm(128, 128, 64, 64, 8, 3), gemm(64, 64, 64, 64, 4, 4)),
    DOWN_PROJECTION: (down(64, 128, 32, 4, 4), down(64, 128, 64, 4, 3), down(64, 64, 128, 8, 3)),
    GRAD_S_B: (grad(64, 256, 32, 8, 3),),
    GRAD_A: (grad(64, 128, 32, 4, 3), grad(64, 128, 64, 8, 3), grad(64, 128, 128, 8, 3)),
}
