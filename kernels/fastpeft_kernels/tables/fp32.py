"""fp32 operands, on every device.

fp32 keeps fp32's products ("ieee"): no tensor cores on NVIDIA, so tiles are those of a plain FMA loop and one
table serves all."""

from __future__ import annotations

from ..kernel_names import DOWN_PROJECTION, GRAD_A, GRAD_S_B, RANK_R_GEMM, RANK_R_GEMM_DROPOUT
from ..tile import Table, down, gemm, grad

TABLE: Table = {
    RANK_R_GEMM: (gemm(64, 64, 16, 16, 8, 2),),
    RANK_R_GEMM_DROPOUT: (gemm(64, 64, 16, 16, 8, 2),),
    DOWN_PROJECTION: (down(32, 32, 32, 4, 2),),
    GRAD_S_B: (grad(16, 64, 32, 4, 2),),
    GRAD_A: (grad(16, 64, 32, 4, 2),),
}
