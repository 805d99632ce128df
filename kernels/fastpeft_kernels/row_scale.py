"""DoRA's row scale `c = m / ||W + s B A||_row` (arXiv 2402.09353), made in registers wherever it is needed.

Two rows need care, and no other row's bits change. A row of norm 0 has z = 0 as well: its c is 0. A row whose
|c| is below TINY would lose z in y = c*z, from which backward recovers z as y/c: it takes c = TINY with m's
sign, so that y is some 1e-30 z where the formula says less, and dm keeps its full precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 2^-100: TINY * z stays a normal fp32 and bf16 number (above 2^-126) for every |z| above 2^-26.
TINY = tl.constexpr(2.0**-100)


@triton.jit  # type: ignore[untyped-decorator]
def row_scale(b_m: tl.tensor, b_norm: tl.tensor) -> tl.tensor:
    """c in fp32 from the magnitude and the norm, both fp32 and of one shape; NaN stays NaN."""
    # Rounded division: every kernel that makes c makes the same bits, whatever the compiler's `/` is.
    b_c = tl.div_rn(b_m, tl.where(b_norm == 0.0, 1.0, b_norm))
    b_c = tl.where(tl.abs(b_c) < TINY, tl.where(b_m < 0.0, -TINY, TINY), b_c)
    return tl.where(b_norm == 0.0, 0.0, b_c)
