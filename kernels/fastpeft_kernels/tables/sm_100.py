"""B200: 227 KiB of shared memory a block, tcgen05 with its accumulators in tensor memory."""

from __future__ import annotations

from dataclasses import replace

from ..kernel_names import (
    DOWN_PROJECTION,
    GRAD_A,
    RANK_R_GEMM,
    RANK_R_GEMM_DORA_Z,
    RANK_R_GEMM_TMA,
    STACKED_DOWN,
    STACKED_DX,
    STACKED_DX_DROPOUT,
    STACKED_GEMM,
)
from ..tile import Table, down, gemm, grad
from . import sm_90

TABLE: Table = {
    **sm_90.TABLE,
    RANK_R_GEMM: (
        gemm(128, 128, 64, 128, 8, 3),
        gemm(64, 128, 64, 64, 4, 4),
        gemm(64, 64, 64, 64, 4, 4),
    ),
    RANK_R_GEMM_DORA_Z: (gemm(64, 128, 64, 128, 8, 4), gemm(64, 64, 64, 64, 4, 4)),
    DOWN_PROJECTION: (down(64, 64, 64, 4, 3), down(64, 32, 128, 4, 4)),
    GRAD_A: (grad(64, 128, 32, 8, 2), grad(64, 128, 64, 8, 3), grad(64, 64, 128, 8, 3)),
    RANK_R_GEMM_TMA: (
        replace(gemm(128, 256, 64, 32, 8, 4), warp_specialize=True),
        replace(gemm(128, 128, 64, 128, 8, 4), warp_specialize=True),
    ),
    STACKED_DOWN: (down(64, 64, 32, 8, 4),),
    STACKED_GEMM: (gemm(128, 256, 64, 64, 8, 3), gemm(64, 64, 64, 64, 4, 4)),
    STACKED_DX: (gemm(128, 256, 64, 64, 8, 3), gemm(64, 64, 64, 64, 4, 4)),
    STACKED_DX_DROPOUT: (gemm(128, 256, 64, 64, 8, 3), gemm(64, 64, 64, 64, 4, 4)),
}
