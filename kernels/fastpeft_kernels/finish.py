"""Split reductions in one launch: the program that finishes last adds the partials, in a fixed order.

Every program writes its fp32 partial, then counts itself in. Whoever counts last finds all partials written
and adds them in the order of their index, so the sum does not depend on who that is: no float atomics,
bitwise repeatable, and no second launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def is_last(p_counter: tl.tensor, n_programs: tl.tensor) -> tl.tensor:
    """Count this program in; True for the last of `n_programs`, which leaves the counter at zero.

    The partials were stored by all threads of the program, the counter is changed by one: the barrier before
    orders the stores before the release, the barrier after orders the caller's loads behind the acquire. Load
    partials with cache_modifier=".cg": another multiprocessor wrote them, and the first-level cache is not
    coherent.
    """
    tl.debug_barrier()
    last = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") == n_programs - 1
    if last:
        tl.store(p_counter, 0)
    tl.debug_barrier()
    return last


@triton.jit  # type: ignore[untyped-decorator]
def sum_partials(
    p_first: tl.tensor,
    m_first: tl.tensor,
    n_partials: tl.tensor,
    stride_partial: tl.tensor,
    UNROLL: tl.constexpr = 1,
) -> tl.tensor:
    """Sum of `n_partials` blocks of fp32, the first at `p_first`, in the order of their index.

    UNROLL blocks are loaded at a time. One program reads what many wrote: it needs tens of KiB in flight to
    draw on L2's bandwidth, which a tile of dA brings along (32 KiB at 128x64) and a short row does not.
    """
    b_sum = tl.load(p_first, mask=m_first, other=0.0, cache_modifier=".cg")
    for i_partial in tl.range(1, n_partials, num_stages=1, loop_unroll_factor=UNROLL):
        o_partial = tl.cast(i_partial, tl.int64) * stride_partial
        b_sum += tl.load(p_first + o_partial, mask=m_first, other=0.0, cache_modifier=".cg")
    return b_sum
