"""The packed dropout mask on its own, for an input gradient whose dA is not wanted.

Where dA is wanted, `stacked_grad` draws the mask anyway and packs it on the way. The GEMM after it then reads
an eighth of a 16-bit operand's bytes instead of drawing again: at 8192x4096 and three masks the drawing would
take some 90 us of an H100's integer units (modelled), after the GEMM's loop and not beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .dropout import draw_mask, pack_mask

# 8 Philox calls a thread: enough for the store of a row to be a full 32 bytes.
BLOCK_M = 32
BLOCK_K = 128
NUM_WARPS = 4


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def packed_mask_kernel(
    p_seed: tl.tensor,
    p_packed: tl.tensor,
    M: tl.tensor,
    K: tl.tensor,
    dropout_p: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One program, one tile of packed [M, ceil(K / 4)], contiguous."""
    i_m = tl.program_id(0)
    i_k = tl.program_id(1)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_group = (i_k * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)).to(tl.int64)
    n_group = tl.cdiv(K, 4)
    b_0, b_1, b_2, b_3 = draw_mask(p_seed, dropout_p, o_m, i_k * BLOCK_K, K, BLOCK_K)
    b_packed = pack_mask(b_0, b_1, b_2, b_3)
    m_tile = (o_m < M)[:, None] & (o_group < n_group)[None, :]
    tl.store(p_packed + o_m[:, None] * n_group + o_group[None, :], b_packed, mask=m_tile)


def empty_mask(m: int, k: int, like: Tensor) -> Tensor:
    """Room for the packed mask of an [m, k] matrix."""
    return launch.empty((m, launch.cdiv(k, 4)), torch.uint8, like)


def fill_mask(packed: Tensor, k: int, dropout_p: float, seed: Tensor) -> None:
    """Write the mask of an [M, k] matrix into `packed` [M, ceil(k / 4)]."""
    m = packed.shape[0]
    if m == 0:
        return
    packed_mask_kernel[(launch.cdiv(m, BLOCK_M), launch.cdiv(k, BLOCK_K))](
        seed,
        packed,
        m,
        k,
        dropout_p,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS,
        enable_fp_fusion=launch.FP_FUSION,
    )
