"""fp32 operands, on every device.

fp32 keeps fp32's products ("ieee"): no tensor cores on NVIDIA, so tiles are those of a plain FMA loop and one
table serves all."""

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
    # Four warps spill 12 bytes on sm_120 beside two rank tiles, at all 255 registers.
    RANK_R_GEMM: (gemm(64, 64, 16, 16, 8, 2),),
    RANK_R_GEMM_DROPOUT: (gemm(64, 64, 16, 16, 8, 2),),
    DOWN_PROJECTION: (down(32, 32, 32, 4, 2),),
    GRAD_S_B: (grad(16, 64, 32, 8, 2),),
    GRAD_A: (grad(16, 64, 32, 4, 2),),
    RANK_R_GEMM_DORA: (gemm(64, 64, 16, 16, 8, 2),),
    RANK_R_GEMM_DORA_BACKWARD: (gemm(64, 64, 16, 16, 8, 2),),
    RANK_R_GEMM_DORA_DROPOUT: (gemm(64, 64, 16, 16, 8, 2),),
    GRAD_S_B_DORA: (grad(16, 64, 32, 8, 2),),
    ROW_NORM: (down(32, 32, 32, 8, 2),),
    SINGLE: (gemm(32, 32, 16, 64, 8, 2),),
    SINGLE_NORM: (gemm(32, 32, 16, 32, 8, 2),),
    DECODE: (gemm(16, 64, 32, 64, 8, 2),),
    EXPAND: (gemm(32, 64, 0, 16, 8, 1),),
    RANK_R_GEMM_DORA_Z: (gemm(64, 64, 16, 16, 8, 2),),
    RANK_R_GEMM_DORA_DROPOUT_BACKWARD: (gemm(64, 64, 16, 16, 8, 2),),
    RANK_R_GEMM_TMA: (),
    STACKED_DOWN: (down(32, 32, 32, 8, 2),),
    STACKED_GEMM: (gemm(32, 64, 16, 16, 8, 2),),
    STACKED_DX: (gemm(64, 64, 16, 16, 8, 2),),
    STACKED_DX_DROPOUT: (gemm(64, 64, 16, 16, 8, 2),),
    STACKED_GRAD: (grad(16, 64, 16, 8, 2),),
    GLU_GEMM: (gemm(64, 32, 16, 16, 8, 2),),
    GLU_BACKWARD: (gemm(64, 64, 16, 16, 8, 2),),
    GLU_BACKWARD_DROPOUT: (gemm(64, 64, 16, 16, 8, 2),),
}
