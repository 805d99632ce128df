"""Second stage of every split reduction: `out[i] = sum_p partial[p, i]`, in fp32, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

# 1024 elements and 4 warps: 8 fp32 values a thread, two 16-byte loads in flight per partial.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit(do_not_specialize=["n_partials"])  # type: ignore[untyped-decorator]
def reduce_kernel(
    p_partial: tl.tensor,
    p_out: tl.tensor,
    n_elements: tl.tensor,
    n_partials: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> None:
    """Each program owns BLOCK_N elements and walks the partials in order."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n_elements
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i_p in range(n_partials):
        # n_elements is below 2^31 for a gradient, i_p * n_elements need not be.
        o_p = tl.cast(i_p, tl.int64) * n_elements
        b_sum += tl.load(p_partial + o_p + o_n, mask=m_n, other=0.0)
    tl.store(p_out + o_n, b_sum.to(p_out.dtype.element_ty), mask=m_n)


def reduce_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum `partial [P, ...]` (fp32, contiguous) over its first axis into a new tensor of `dtype`."""
    out = launch.empty(tuple(partial.shape[1:]), dtype, partial)
    n_elements = out.numel()
    grid = (launch.cdiv(n_elements, BLOCK),)
    reduce_kernel[grid](
        partial,
        out,
        n_elements,
        partial.shape[0],
        BLOCK_N=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return out
