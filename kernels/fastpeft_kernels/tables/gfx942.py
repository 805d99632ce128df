"""MI300: 64 KiB of LDS, MFMA.

A lane mask takes two scalar registers here: more than 16 masked or dropped-out elements a thread spill
those.
"""

from __future__ import annotations

from ..kernel_names import DOWN_PROJECTION, GRAD_A, GRAD_S_B, RANK_R_GEMM, RANK_R_GEMM_DROPOUT
from ..tile import Table, down, gemm, grad

TABLE: Table = {
    RANK_R_GEMM: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    RANK_R_GEMM_DROPOUT: (gemm(128, 128, 64, 64, 8, 2), gemm(64, 64, 64, 64, 4, 2)),
    DOWN_PROJECTION: (down(64, 64, 16, 4, 2), down(64, 32, 128, 8, 2)),
    GRAD_S_B: (grad(16, 256, 16, 8, 2), grad(32, 128, 32, 4, 2)),
    GRAD_A: (grad(64, 64, 32, 4, 2), grad(32, 128, 128, 8, 2)),
}
