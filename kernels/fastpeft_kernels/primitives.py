"""What several kernels share: the order of tiles, and DoRA's row scale."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .row_scale import row_scale


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScale:
    """DoRA's `c = m / n`, as its two parts: kernels divide in registers, which saves a launch.

    Attributes:
        magnitude: [N], m, of any floating dtype and stride.
        norm: [N] fp32 contiguous, `n = ||W + s B A||` of each row.
        c: [N] fp32 contiguous, which backward's first pass over dY fills for those that come after it: a
            division in a GEMM's main loop would be made again by every program.
    """

    magnitude: Tensor
    norm: Tensor
    c: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptProduct:
    """What DoRA's forward kept for dm.

    Attributes:
        values: [M, N], contiguous: `z`, the product before the row scale, or `y = c z`.
        is_z: which of the two.
    """

    values: Tensor
    is_z: bool


@triton.jit  # type: ignore[untyped-decorator]
def load_row_scale(
    p_magnitude: tl.tensor, p_norm: tl.tensor, stride_magnitude: tl.tensor, o_n: tl.tensor, m_n: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """`(c, n)` of the rows o_n, in fp32; both 0 where masked."""
    b_magnitude = tl.load(p_magnitude + o_n * stride_magnitude, mask=m_n, other=0.0).to(tl.float32)
    b_norm = tl.load(p_norm + o_n, mask=m_n, other=0.0)
    return row_scale(b_magnitude, b_norm), b_norm


@triton.jit  # type: ignore[untyped-decorator]
def magnitude_gradient(
    b_dot: tl.tensor, b_c: tl.tensor, b_norm: tl.tensor, KEPT_IS_Z: tl.constexpr
) -> tl.tensor:
    """dm from `colsum(dY * z)`, or from `colsum(dY * c z)`; 0 where n is 0, as z is 0 there."""
    b_divisor = b_norm
    if not KEPT_IS_Z:
        b_divisor = b_c * b_norm
    return tl.where(b_norm == 0.0, 0.0, b_dot / tl.where(b_norm == 0.0, 1.0, b_divisor))


@triton.jit  # type: ignore[untyped-decorator]
def grouped_tile(
    i_tile: tl.tensor, n_m: tl.tensor, n_n: tl.tensor, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """`(i_m, i_n)` of the tile that program `i_tile` makes.

    Tiles run in groups of GROUP_M rows of tiles, so that neighbours in time share both operands in L2.
    """
    tiles_in_group = GROUP_M * n_n
    first_m = (i_tile // tiles_in_group) * GROUP_M
    rows_in_group = tl.minimum(n_m - first_m, GROUP_M)
    i_m = first_m + (i_tile % tiles_in_group) % rows_in_group
    return i_m, (i_tile % tiles_in_group) // rows_in_group


@triton.jit  # type: ignore[untyped-decorator]
def low_product(
    b_acc: tl.tensor,
    p_l: tl.tensor,
    p_r: tl.tensor,
    o_m: tl.tensor,
    m_m: tl.tensor,
    o_n: tl.tensor,
    m_n: tl.tensor,
    R: tl.tensor,
    stride_lm: tl.tensor,
    stride_lr: tl.tensor,
    stride_rr: tl.tensor,
    stride_rn: tl.tensor,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """`acc + L R`, L [M, R] in the compute dtype and R [R, N], which is converted to it in registers."""
    # One stage: the loop usually runs once, and a pipeline would need shared memory of its own.
    for i_r in tl.range(0, tl.cdiv(R, BLOCK_R), num_stages=1):
        o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        m_r = o_r < R
        b_l = tl.load(
            p_l + o_m[:, None] * stride_lm + o_r[None, :] * stride_lr,
            mask=m_m[:, None] & m_r[None, :],
            other=0.0,
        )
        b_r = tl.load(
            p_r + o_r[:, None] * stride_rr + o_n[None, :] * stride_rn,
            mask=m_r[:, None] & m_n[None, :],
            other=0.0,
        )
        b_acc = tl.dot(b_l, b_r.to(b_l.dtype), b_acc, input_precision="ieee")
    return b_acc
