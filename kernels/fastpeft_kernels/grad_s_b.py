"""`dS = s dY B`, `dB = s dY^T S` and `dbias = colsum(dY)` from one read of dY.

dS sums over the columns of dY and dB over its rows, so one of the two cannot stay in registers. A program
owns BLOCK_N columns and a run of rows: dB accumulates in registers, and each row tile writes an fp32
partial of dS. Those partials cost `8 M N r / BLOCK_N` bytes written and read, `4 r / BLOCK_N` of the dY
read saved. At r = 64 and BLOCK_N = 256 that is all of it, so above `MAX_RANK` dS and dB are two products
instead (see `lora.py`). No atomics: partials are added by an ordered second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .reduce import reduce_partials

# 4 r / BLOCK_N is 0.5 at r = 32, BLOCK_N = 256 and 1.0 at r = 64: no bytes gained beyond 32, and B's tile and
# dB's accumulator share the registers with dY's tile.
MAX_RANK = 32


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def grad_s_b_kernel(
    p_dy: tl.tensor,
    p_b: tl.tensor,
    p_s: tl.tensor,
    p_ds: tl.tensor,
    p_db: tl.tensor,
    p_dbias: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    R: tl.tensor,
    stride_dm: tl.tensor,
    stride_dn: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    stride_sm: tl.tensor,
    stride_sr: tl.tensor,
    tiles_per_split: tl.tensor,
    scale: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of N, split of M); ds is [tiles of N, M, R], db [splits, N, R], dbias [splits, N]."""
    i_n = tl.program_id(0)
    i_split = tl.program_id(1)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    m_n = o_n < N
    m_r = o_r < R
    m_nr = m_n[:, None] & m_r[None, :]

    b_b = tl.load(p_b + o_n[:, None] * stride_bn + o_r[None, :] * stride_br, mask=m_nr, other=0.0)
    b_b = b_b.to(p_dy.dtype.element_ty)
    b_db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    b_dbias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(M, BLOCK_M))
    for i_m in range(first, last):
        o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < M
        m_mr = m_m[:, None] & m_r[None, :]
        b_dy = tl.load(
            p_dy + o_m[:, None] * stride_dm + o_n[None, :] * stride_dn,
            mask=m_m[:, None] & m_n[None, :],
            other=0.0,
        )
        b_s = tl.load(p_s + o_m[:, None] * stride_sm + o_r[None, :] * stride_sr, mask=m_mr, other=0.0)
        b_ds = tl.dot(b_dy, b_b, input_precision="ieee") * scale
        p_tile = p_ds + (i_n.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :]
        tl.store(p_tile, b_ds.to(p_ds.dtype.element_ty), mask=m_mr)
        b_db = tl.dot(tl.trans(b_dy), b_s, b_db, input_precision="ieee")
        if HAS_BIAS:
            b_dbias += tl.sum(b_dy.to(tl.float32), axis=0)

    b_db *= scale
    o_out = i_split.to(tl.int64) * N + o_n
    tl.store(p_db + o_out[:, None] * R + o_r[None, :], b_db.to(p_db.dtype.element_ty), mask=m_nr)
    if HAS_BIAS:
        tl.store(p_dbias + o_out, b_dbias.to(p_dbias.dtype.element_ty), mask=m_n)


def grad_s_b(
    dy: Tensor, b: Tensor, s: Tensor, scaling: float, *, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(dS [M, r] in dY's dtype, dB [N, r] in dtype, dbias [N] in bias_dtype or None)`.

    dy [M, N], b [N, r] (its own dtype, converted in registers), s [M, r] in dY's dtype; any strides;
    r at most MAX_RANK, because B's tile stays in registers for the whole row loop.
    """
    m, n = dy.shape
    r = b.shape[1]
    config = configs.select(configs.GRAD_S_B, dy, r)
    tiles_n = launch.cdiv(n, config.block_n)
    units = launch.unit_count(dy.device)
    splits, per_split = launch.split_reduction(tiles_n, launch.cdiv(m, config.block_m), units)
    has_bias = bias_dtype is not None
    ds = launch.empty((tiles_n, m, r), dy.dtype if tiles_n == 1 else launch.PARTIAL_DTYPE, dy)
    db = launch.empty((splits, n, r), dtype if splits == 1 else launch.PARTIAL_DTYPE, dy)
    dbias = None
    if bias_dtype is not None:
        dbias = launch.empty((splits, n), bias_dtype if splits == 1 else launch.PARTIAL_DTYPE, dy)
    grad_s_b_kernel[(tiles_n, splits)](
        dy,
        b,
        s,
        ds,
        db,
        dbias,
        m,
        n,
        r,
        dy.stride(0),
        dy.stride(1),
        b.stride(0),
        b.stride(1),
        s.stride(0),
        s.stride(1),
        per_split,
        scaling,
        HAS_BIAS=has_bias,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.r_tile(r),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    ds = ds[0] if tiles_n == 1 else reduce_partials(ds, dy.dtype)
    if splits == 1:
        return ds, db[0], dbias[0] if dbias is not None else None
    if dbias is not None and bias_dtype is not None:
        dbias = reduce_partials(dbias, bias_dtype)
    return ds, reduce_partials(db, dtype), dbias
