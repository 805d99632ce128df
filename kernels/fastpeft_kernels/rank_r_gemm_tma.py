"""`rank_r_gemm` for Hopper and Blackwell: operands come and results go by TMA.

The same product, `out = c * (P Q + scale * L R) + bias`, in 16 bits and without dropout. Against the plain
loads of `rank_r_gemm.py`, in the code that Triton 3.7.1 makes for a 128x256x64 tile at r = 16 (forward,
backward): the main loop has 90 and 89 instructions where it had 133 and 175, for the same four wgmma, because
one thread asks for a tile where 256 computed twelve addresses each; 166 and 162 registers where there were
206 and 208. On sm_100 the K loop is warp-specialised besides: the loads and the tcgen05
instructions are issued by a warp each (47 instructions a turn of four), the others wait for the epilogue.

Tiles are not persistent: with the loops kept apart nothing overlaps and the store's buffer costs a stage of
the pipeline; flattened into one loop, the epilogue is inside it and the code doubles (`kernels/README.md`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .primitives import RowScale, grouped_tile, load_row_scale

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4 makes no descriptors on the host
    TensorDescriptor = None


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def rank_r_gemm_tma_kernel(
    d_p: tl.tensor_descriptor,
    d_q: tl.tensor_descriptor,
    p_l: tl.tensor,
    p_r: tl.tensor,
    p_bias: tl.tensor,
    p_magnitude: tl.tensor,
    p_norm: tl.tensor,
    d_out: tl.tensor_descriptor,
    d_z: tl.tensor_descriptor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_lm: tl.tensor,
    stride_lr: tl.tensor,
    stride_rr: tl.tensor,
    stride_rn: tl.tensor,
    stride_bias: tl.tensor,
    stride_magnitude: tl.tensor,
    scale: tl.tensor,
    inverse_scale: tl.tensor,
    HAS_BIAS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    Q_BY_COLUMNS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    R_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """One program, one tile of out [M, N]; P [M, K], L [M, R], R [R, N], Q [K, N] or (Q_BY_COLUMNS) [N, K].

    TMA reads zeros past the end of a tensor and writes nothing there, so only what is left of it needs masks.
    """
    i_m, i_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < M
    m_n = o_n < N

    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i_k in tl.range(0, tl.cdiv(K, BLOCK_K), warp_specialize=WARP_SPECIALIZE):
        b_p = d_p.load([i_m * BLOCK_M, i_k * BLOCK_K])
        if Q_BY_COLUMNS:
            b_q = d_q.load([i_n * BLOCK_N, i_k * BLOCK_K]).T
        else:
            b_q = d_q.load([i_k * BLOCK_K, i_n * BLOCK_N])
        b_acc = tl.dot(b_p, b_q, b_acc, input_precision="ieee")

    # On top of the base product, as in rank_r_gemm. The tiles of the rank are unrolled: a loop that usually
    # runs once keeps its addresses and counters in 25 registers more (191 to 166 at r = 16).
    b_acc *= inverse_scale
    for i_r in tl.static_range(R_TILES):
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
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
    b_acc *= scale
    if KEEP_Z:
        d_z.store([i_m * BLOCK_M, i_n * BLOCK_N], b_acc.to(d_z.dtype))
    if SCALE_COLUMNS:
        b_c, _ = load_row_scale(p_magnitude, p_norm, stride_magnitude, o_n, m_n)
        b_acc *= b_c[None, :]
    if HAS_BIAS:
        b_acc += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    d_out.store([i_m * BLOCK_M, i_n * BLOCK_N], b_acc.to(d_out.dtype))


def _by_rows(matrix: Tensor) -> bool:
    """Whether TMA can read `matrix` as it lies: rows contiguous, apart and on 16 bytes."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
    )


def select(p: Tensor, q: Tensor, rank: int, *, keep_z: bool = False) -> configs.KernelConfig | None:
    """The row for `p [M, K] q [K, N]`: the largest whose rank tile covers `rank` and that fills the device.

    None where `rank_r_gemm` is to be used: the device has no TMA (no rows), fp32, a layout or width that TMA
    cannot take, fewer tiles than units, or z wanted where warps are specialised (a second store spills).
    """
    if TensorDescriptor is None or p.dtype not in (torch.bfloat16, torch.float16):
        return None
    fits = _by_rows(p) and (_by_rows(q) or _by_rows(q.t())) and q.shape[1] * q.element_size() % 16 == 0
    if not fits or p.shape[1] == 0:
        return None
    rows = configs.rows(configs.RANK_R_GEMM_TMA, p, q)
    units = launch.unit_count(p.device)
    for row in [row for row in rows if row.block_r >= rank] or rows[-1:]:
        filled = launch.cdiv(p.shape[0], row.block_m) * launch.cdiv(q.shape[1], row.block_n) >= units
        if filled and not (keep_z and row.warp_specialize):
            return row
    return None


def rank_r_gemm_tma(
    p: Tensor,
    q: Tensor,
    low: Tensor,
    r: Tensor,
    bias: Tensor | None,
    scale: float,
    config: configs.KernelConfig,
    *,
    scale_columns: RowScale | None = None,
    keep_z: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`z = p q + scale * low r`, `out = c_n * z + bias`, both [M, N] in p's dtype; z is None unless kept.

    Args:
        p: [M, K], fp16 or bf16.
        q: [K, N] in p's dtype.
        low: [M, rank] in p's dtype, any strides.
        r: [rank, N], in p's dtype or fp32, any strides.
        bias: [N] of any floating dtype, or None.
        scale: applied in fp32; below 1e-30 in size it counts as zero, as in `rank_r_gemm`.
        config: what `select(p, q, rank, keep_z=keep_z)` gave.
        scale_columns: c_n [N]; 1 when None.
        keep_z: whether z is wanted too.
    """
    m, k = p.shape
    n = q.shape[1]
    rank = low.shape[1]
    if abs(scale) < 1e-30:
        scale, rank = 1.0, 0
    block_r = config.r_tile(low.shape[1])
    by_columns = not _by_rows(q)
    q_block = (config.block_n, config.block_k) if by_columns else (config.block_k, config.block_n)
    tile = [config.block_m, config.block_n]
    out = launch.empty((m, n), p.dtype, p)
    z = launch.empty((m, n), p.dtype, p) if keep_z else None
    rank_r_gemm_tma_kernel[(launch.cdiv(m, config.block_m) * launch.cdiv(n, config.block_n),)](
        TensorDescriptor.from_tensor(p, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(q.t() if by_columns else q, list(q_block)),
        low,
        r,
        bias,
        scale_columns.magnitude if scale_columns is not None else None,
        scale_columns.norm if scale_columns is not None else None,
        TensorDescriptor.from_tensor(out, tile),
        TensorDescriptor.from_tensor(z, tile) if z is not None else None,
        m,
        n,
        k,
        rank,
        low.stride(0),
        low.stride(1),
        r.stride(0),
        r.stride(1),
        bias.stride(0) if bias is not None else 0,
        scale_columns.magnitude.stride(0) if scale_columns is not None else 0,
        scale,
        1.0 / scale,
        HAS_BIAS=bias is not None,
        SCALE_COLUMNS=scale_columns is not None,
        KEEP_Z=keep_z,
        Q_BY_COLUMNS=by_columns,
        WARP_SPECIALIZE=config.warp_specialize,
        R_TILES=launch.cdiv(rank, block_r),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=block_r,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
    )
    return out, z
