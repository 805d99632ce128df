"""`dS = s (c * dY) B`, `dB = s (c * dY)^T S`, dbias and DoRA's dm from one read of dY (c = 1 in LoRA).

dS sums over the columns of dY and dB over its rows, so one of the two cannot stay in registers. A program
owns BLOCK_N columns and a split of the rows: dB accumulates in registers, and each row tile writes an fp32
partial of dS. Those partials cost `8 M N r / BLOCK_N` bytes written and read, `4 r / BLOCK_N` of the dY read
that is saved: a quarter at r = 16 and BLOCK_N = 256 or r = 32 and 512, half at r = 32 and 256, all of it at
r = 64 and 256. There no byte is saved, but a launch is, and the partials (8 MiB for each rank 16 at
8192x4096) come back from L2 where dY comes from memory. On sm_90 every tile of 512 columns spills at r = 64
(32x512: 120 bytes with 8 warps, 208 with 16). Tables end at the last rank that compiles without spills at
that price; above it, dS and dB are two products (`reduce_dy.py`).

`c * dY` is never formed: c scales the rows of B for dS, in fp32 in front of the cast, and the rows of dB
afterwards. No atomics on floats: the last program to arrive adds the partials. For dB that is the last of the
splits of a tile. For dS it is the last of the tiles on a run of rows; a split is cut into CHUNKS runs, which
its programs visit in rotated order, so that the last programs, and with them the adding, are spread out: at
8192x4096 and r = 16, one program for each of 8 splits would add 1 MiB, 10 us at 110 GB/s of L2 bandwidth.

The rank is a compile-time constant, so masks of ranks that are no multiple of 16 fold away: as a run-time
number it cost 100 bytes of spills at r = 8 on gfx942. A model has few ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .finish import is_last, sum_partials
from .grad_a import store_columns
from .primitives import KeptProduct, RowScale, load_row_scale, magnitude_gradient

# Runs of rows a split is cut into. Each costs a drained pipeline and one round trip to a counter, 1 to 2 us
# against the 5 us that a program takes to read a quarter of its rows at the size above.
CHUNKS = 4

# Elements of dS added at a time, four partials in flight: 8 registers a thread times five, with 8 warps.
BLOCK_SUM = tl.constexpr(2048)


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def grad_s_b_kernel(
    p_dy: tl.tensor,
    p_b: tl.tensor,
    p_s: tl.tensor,
    p_ds: tl.tensor,
    p_db: tl.tensor,
    p_dbias: tl.tensor,
    p_dm: tl.tensor,
    p_partial: tl.tensor,
    p_counter: tl.tensor,
    p_kept: tl.tensor,
    p_magnitude: tl.tensor,
    p_norm: tl.tensor,
    p_c: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    R: tl.constexpr,
    stride_dm: tl.tensor,
    stride_dn: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    stride_magnitude: tl.tensor,
    tiles_per_split: tl.tensor,
    scale: tl.tensor,
    HAS_SUM: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_DM: tl.constexpr,
    KEPT_IS_Z: tl.constexpr,
    HAS_TILES: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of N, split of M); partial holds dS's [tiles of N, M, R], if any, then the others'."""
    i_n = tl.program_id(0)
    i_split = tl.program_id(1)
    n_tiles = tl.num_programs(0)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    m_n = o_n < N
    m_r = o_r < R
    m_nr = m_n[:, None] & m_r[None, :]

    b_b = tl.load(p_b + o_n[:, None] * stride_bn + o_r[None, :] * stride_br, mask=m_nr, other=0.0)
    if HAS_ROW_SCALE:
        b_c, b_norm = load_row_scale(p_magnitude, p_norm, stride_magnitude, o_n, m_n)
        b_b = b_b.to(tl.float32) * b_c[:, None]
        tl.store(p_c + o_n, b_c, mask=m_n & (i_split == 0))
    b_b = b_b.to(p_dy.dtype.element_ty)
    b_db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_dm = tl.zeros((BLOCK_N,), dtype=tl.float32)
    stride_partial = M.to(tl.int64) * R
    tiles_per_chunk = tl.cdiv(tiles_per_split, CHUNKS)
    last_tile = tl.minimum((i_split + 1) * tiles_per_split, tl.cdiv(M, BLOCK_M))
    for i_turn in range(CHUNKS):
        i_chunk = (i_turn + i_n + 1) % CHUNKS
        first = i_split * tiles_per_split + i_chunk * tiles_per_chunk
        last = tl.minimum(first + tiles_per_chunk, last_tile)
        for i_m in range(first, last):
            o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            m_m = o_m < M
            m_mn = m_m[:, None] & m_n[None, :]
            m_mr = m_m[:, None] & m_r[None, :]
            b_dy = tl.load(p_dy + o_m[:, None] * stride_dm + o_n[None, :] * stride_dn, mask=m_mn, other=0.0)
            o_s = o_m[:, None] * R + o_r[None, :]
            b_s = tl.load(p_s + o_s, mask=m_mr, other=0.0)
            b_ds = tl.dot(b_dy, b_b, input_precision="ieee") * scale
            if HAS_TILES:
                tl.store(p_partial + i_n * stride_partial + o_s, b_ds, mask=m_mr)
            else:
                tl.store(p_ds + o_s, b_ds.to(p_ds.dtype.element_ty), mask=m_mr)
            b_db = tl.dot(tl.trans(b_dy), b_s, b_db, input_precision="ieee")
            if HAS_SUM:
                b_sum += tl.sum(b_dy.to(tl.float32), axis=0)
            if HAS_DM:
                b_kept = tl.load(p_kept + o_m[:, None] * N + o_n[None, :], mask=m_mn, other=0.0)
                b_dm += tl.sum(b_dy.to(tl.float32) * b_kept.to(tl.float32), axis=0)
        if HAS_TILES:  # noqa: SIM102 - `and` would count in where there is nothing to count
            if is_last(p_counter + i_split * CHUNKS + i_chunk, n_tiles):
                # The rows of a run lie side by side in out and in every partial.
                o_first = tl.cast(first, tl.int64) * BLOCK_M * R
                o_last = tl.minimum(tl.cast(last, tl.int64) * BLOCK_M, M) * R
                for i_sum in range(tl.cdiv(tl.maximum(o_last - o_first, 0), BLOCK_SUM)):
                    o_ds = o_first + i_sum * BLOCK_SUM + tl.arange(0, BLOCK_SUM)
                    b_ds = sum_partials(p_partial + o_ds, o_ds < o_last, n_tiles, stride_partial, 4)
                    tl.store(p_ds + o_ds, b_ds.to(p_ds.dtype.element_ty), mask=o_ds < o_last)

    if IS_SPLIT and HAS_TILES:
        p_partial += n_tiles * stride_partial
    b_db *= scale
    if HAS_ROW_SCALE:
        b_db *= b_c[:, None]
        if HAS_DM:
            b_dm = magnitude_gradient(b_dm, b_c, b_norm, KEPT_IS_Z)
    store_columns(
        b_db,
        b_sum,
        b_dm,
        p_db,
        p_dbias,
        p_dm,
        p_partial,
        p_counter,
        tl.num_programs(1) * CHUNKS + i_n,
        o_n[:, None] * R + o_r[None, :],
        m_nr,
        o_n,
        m_n,
        N,
        R,
        HAS_SUM,
        HAS_DM,
        IS_SPLIT,
    )


def max_rank(dy: Tensor, row_scale: RowScale | None) -> int:
    """The largest rank that `grad_s_b` takes on dY's device and in its dtype and layout."""
    kernel = configs.GRAD_S_B if row_scale is None else configs.GRAD_S_B_DORA
    return configs.rows(kernel, dy)[-1].block_r


def grad_s_b(
    dy: Tensor,
    b: Tensor,
    s: Tensor,
    scaling: float,
    *,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    row_scale: RowScale | None = None,
    kept: KeptProduct | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`(dS [M, r] in dY's dtype, dB [N, r] in dtype, dbias [N] in bias_dtype or None, dm [N] or None)`.

    dy [M, N] and b [N, r] (its own dtype, converted in registers) of any strides, s [M, r] in dY's dtype; r
    at most `max_rank`, because B's tile stays in registers for the whole row loop. `row_scale` and `kept` are
    DoRA's, as in `grad_a`.
    """
    m, n = dy.shape
    r = b.shape[1]
    config = configs.select(configs.GRAD_S_B if row_scale is None else configs.GRAD_S_B_DORA, dy, r)
    tiles_n = launch.cdiv(n, config.block_n)
    units = launch.unit_count(dy.device)
    splits, per_split = launch.split_reduction(tiles_n, launch.cdiv(m, config.block_m), units)
    chunks = CHUNKS if tiles_n > 1 else 1
    ds = launch.empty((m, r), dy.dtype, dy)
    db = launch.empty((n, r), dtype, dy)
    dbias = launch.empty((n,), bias_dtype, dy) if bias_dtype is not None else None
    dm = None
    if kept is not None and row_scale is not None:
        dm = launch.empty((n,), row_scale.magnitude.dtype, dy)
    size = tiles_n * m * r if tiles_n > 1 else 0
    if splits > 1:
        size += splits * n * (r + (dbias is not None) + (dm is not None))
    partial = launch.empty((size,), launch.PARTIAL_DTYPE, dy) if size else None
    grad_s_b_kernel[(tiles_n, splits)](
        dy,
        b,
        s.contiguous(),
        ds,
        db,
        dbias,
        dm,
        partial,
        launch.counters(splits * chunks + tiles_n, dy),
        kept.values if kept is not None else None,
        row_scale.magnitude if row_scale is not None else None,
        row_scale.norm if row_scale is not None else None,
        row_scale.c if row_scale is not None else None,
        m,
        n,
        r,
        dy.stride(0),
        dy.stride(1),
        b.stride(0),
        b.stride(1),
        row_scale.magnitude.stride(0) if row_scale is not None else 0,
        per_split,
        scaling,
        HAS_SUM=dbias is not None,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_DM=dm is not None,
        KEPT_IS_Z=kept is not None and kept.is_z,
        HAS_TILES=tiles_n > 1,
        IS_SPLIT=splits > 1,
        CHUNKS=chunks,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=config.r_tile(r),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
        **configs.all_registers(dy.device),
    )
    return ds, db, dbias, dm
