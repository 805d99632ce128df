"""Keys of the configuration tables: one a kernel, or a variant of it that needs tiles of its own."""

from __future__ import annotations

RANK_R_GEMM = "rank_r_gemm"
RANK_R_GEMM_DROPOUT = "rank_r_gemm_dropout"
RANK_R_GEMM_TMA = "rank_r_gemm_tma"
RANK_R_GEMM_DORA = "rank_r_gemm_dora"
RANK_R_GEMM_DORA_Z = "rank_r_gemm_dora_z"
RANK_R_GEMM_DORA_BACKWARD = "rank_r_gemm_dora_backward"
RANK_R_GEMM_DORA_DROPOUT = "rank_r_gemm_dora_dropout"
RANK_R_GEMM_DORA_DROPOUT_BACKWARD = "rank_r_gemm_dora_dropout_backward"
ROW_NORM = "row_norm"
DOWN_PROJECTION = "down_projection"
GRAD_S_B = "grad_s_b"
GRAD_S_B_DORA = "grad_s_b_dora"
GRAD_A = "grad_a"
SINGLE = "single"
SINGLE_NORM = "single_norm"
DECODE = "decode"
EXPAND = "expand"
STACKED_DOWN = "stacked_down"
STACKED_GEMM = "stacked_gemm"
STACKED_DX = "stacked_dx"
STACKED_DX_DROPOUT = "stacked_dx_dropout"
STACKED_GRAD = "stacked_grad"
GLU_GEMM = "glu_gemm"
GLU_BACKWARD = "glu_backward"
GLU_BACKWARD_DROPOUT = "glu_backward_dropout"

KERNELS = (
    RANK_R_GEMM,
    RANK_R_GEMM_DROPOUT,
    RANK_R_GEMM_TMA,
    RANK_R_GEMM_DORA,
    RANK_R_GEMM_DORA_Z,
    RANK_R_GEMM_DORA_BACKWARD,
    RANK_R_GEMM_DORA_DROPOUT,
    RANK_R_GEMM_DORA_DROPOUT_BACKWARD,
    ROW_NORM,
    DOWN_PROJECTION,
    GRAD_S_B,
    GRAD_S_B_DORA,
    GRAD_A,
    SINGLE,
    SINGLE_NORM,
    DECODE,
    EXPAND,
    STACKED_DOWN,
    STACKED_GEMM,
    STACKED_DX,
    STACKED_DX_DROPOUT,
    STACKED_GRAD,
    GLU_GEMM,
    GLU_BACKWARD,
    GLU_BACKWARD_DROPOUT,
)
