"""The dropout mask as a function of (seed, row, column): nothing is stored, every kernel makes it again.

Philox gives four random numbers a call, and its ten rounds cost more than reading the element they decide
on. Four neighbouring columns therefore share one call: column `c` of row `i` in a matrix of `n` columns
takes word `c % 4` of the call with counter `i * ceil(n / 4) + c // 4`, a 64-bit number. The mask depends on
nothing else: not on tile sizes, on strides, nor on which kernel asks.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    seed = tl.load(p_seed)
    o_group = i_first_column // 4 + tl.arange(0, BLOCK_COLUMNS // 4)
    o_counter = o_row[:, None].to(tl.int64) * tl.cdiv(n_columns, 4) + o_group[None, :]
    b_0, b_1, b_2, b_3 = tl.rand4x(seed, o_counter)
    # join() adds a last axis: [row, group, 2, 2] flattens to columns 0, 1, 2, 3 of each group.
    b_keep = tl.join(
        tl.join(b_0 >= dropout_p, b_2 >= dropout_p),
        tl.join(b_1 >= dropout_p, b_3 >= dropout_p),
    )
    return tl.reshape(b_keep, (o_row.shape[0], BLOCK_COLUMNS))
