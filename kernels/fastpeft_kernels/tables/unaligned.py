"""Wide operands whose rows do not start on 16 bytes (an odd number of columns), on every device.

They are read element by element, past the asynchronous copies, and cost registers: one table of small tiles
for all, where the others spill.
"""

from __future__ import annotations

from ..kernel_names import DOWN_PROJECTION, GRAD_A, GRAD_S_B, RANK_R_GEMM, RANK_R_GEMM_DROPOUT
from ..tile import Table, down, gemm, grad

TABLE: Table = {
    RANK_R_GEMM: (gemm(64, 64, 32, 32, 4, 2),),
    RANK_R_GEMM_DROPOUT: (gemm(64, 64, 32, 32, 8, 2),),
    DOWN_PROJECTION: (down(32, 32, 32, 4, 2),),
    GRAD_S_B: (grad(32, 64, 32, 4, 2),),
    GRAD_A: (grad(32, 64, 32, 4, 2),),
}
