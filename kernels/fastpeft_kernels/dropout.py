"""The dropout mask as a function of (seed, row, column): nothing is stored, every kernel makes it again.

Philox gives four random numbers a call, and its ten rounds cost more than reading the element they decide
on. Four neighbouring columns therefore share one call: column `c` of row `i` in a matrix of `n` columns
takes word `c % 4` of the call with counter `i * ceil(n / 4) + c // 4`, a 64-bit number. The mask depends on
nothing else: not on tile sizes, on strides, nor on which kernel asks.

A GEMM that masks its operand would draw the mask again for every tile of columns: at 128 columns some 2,500
cycles of integer work a step against 1,000 of tensor cores. For it, the kernel that reads the operand just
before packs the mask of four columns into a byte (`pack_mask`), an eighth of a 16-bit operand's bytes, which
lives between those two launches only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

# No tile of any table is longer than this along an axis of x.
PACKED_TILE = 128


def packed_like(x: Tensor) -> Tensor:
    """Memory for the packed mask of x [M, K], uint8 [M', K' / 4]: M and K rounded up to whole tiles."""
    rows, columns = (launch.cdiv(size, PACKED_TILE) * PACKED_TILE for size in x.shape)
    return launch.empty((rows, columns // 4), torch.uint8, x)


@triton.jit  # type: ignore[untyped-decorator]
def draw_mask(
    p_seed: tl.tensor,
    dropout_p: tl.tensor,
    o_row: tl.tensor,
    i_first_column: tl.tensor,
    n_columns: tl.tensor,
    BLOCK_COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Whether columns 0, 1, 2, 3 of each group of four are kept, each [len(o_row), BLOCK_COLUMNS / 4]."""
    seed = tl.load(p_seed)
    o_group = i_first_column // 4 + tl.arange(0, BLOCK_COLUMNS // 4)
    o_counter = o_row[:, None].to(tl.int64) * tl.cdiv(n_columns, 4) + o_group[None, :]
    b_0, b_1, b_2, b_3 = tl.rand4x(seed, o_counter)
    return b_0 >= dropout_p, b_1 >= dropout_p, b_2 >= dropout_p, b_3 >= dropout_p


@triton.jit  # type: ignore[untyped-decorator]
def interleave(b_0: tl.tensor, b_1: tl.tensor, b_2: tl.tensor, b_3: tl.tensor) -> tl.tensor:
    """Four [rows, groups] as one [rows, 4 groups], column `4 g + j` from `b_j`."""
    # join() adds a last axis: [row, group, 2, 2] flattens to columns 0, 1, 2, 3 of each group.
    b = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    return tl.reshape(b, (b_0.shape[0], 4 * b_0.shape[1]))


@triton.jit  # type: ignore[untyped-decorator]
def keep_mask(
    p_seed: tl.tensor,
    dropout_p: tl.tensor,
    o_row: tl.tensor,
    i_first_column: tl.tensor,
    n_columns: tl.tensor,
    BLOCK_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """True where an element is kept; rows `o_row`, columns `i_first_column + [0, BLOCK_COLUMNS)`.

    `i_first_column` and BLOCK_COLUMNS are multiples of 4. The block is [len(o_row), BLOCK_COLUMNS].
    """
    b_0, b_1, b_2, b_3 = draw_mask(p_seed, dropout_p, o_row, i_first_column, n_columns, BLOCK_COLUMNS)
    return interleave(b_0, b_1, b_2, b_3)


@triton.jit  # type: ignore[untyped-decorator]
def pack_mask(b_0: tl.tensor, b_1: tl.tensor, b_2: tl.tensor, b_3: tl.tensor) -> tl.tensor:
    """What `draw_mask` gave as uint8: bit j of group g is column `4 g + j`."""
    b_low = b_0.to(tl.uint8) | (b_1.to(tl.uint8) << 1)
    return b_low | (b_2.to(tl.uint8) << 2) | (b_3.to(tl.uint8) << 3)


@triton.jit  # type: ignore[untyped-decorator]
def unpack_mask(b_packed: tl.tensor) -> tl.tensor:
    """The mask [rows, 4 groups] that was packed, like `keep_mask`."""
    return interleave((b_packed & 1) != 0, (b_packed & 2) != 0, (b_packed & 4) != 0, (b_packed & 8) != 0)
