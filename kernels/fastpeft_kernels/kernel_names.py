"""Keys of the configuration tables: one a kernel, or a variant of it that needs tiles of its own."""

from __future__ import annotations

RANK_R_GEMM = "rank_r_gemm"
RANK_R_GEMM_DROPOUT = "rank_r_gemm_dropout"
DOWN_PROJECTION = "down_projection"
GRAD_S_B = "grad_s_b"
GRAD_A = "grad_a"

KERNELS = (RANK_R_GEMM, RANK_R_GEMM_DROPOUT, DOWN_PROJECTION, GRAD_S_B, GRAD_A)
