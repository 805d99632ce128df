"""Pieces of the block kernels: base product, a projection's epilogue, the rank-r part of an input gradient.

All are inlined into their callers, whose projections come in as tuples of pointers and strides, one entry a
projection: an entry that is None (no bias, no adapter, no magnitude) drops its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .dropout import unpack_mask
from .primitives import load_row_scale, low_product
from .projection import Projection


@triton.jit  # type: ignore[untyped-decorator]
def base_product(
    b_acc: tl.tensor,
    p_p: tl.tensor,
    p_q: tl.tensor,
    p_c: tl.tensor,
    o_m: tl.tensor,
    m_m: tl.tensor,
    o_n: tl.tensor,
    m_n: tl.tensor,
    K: tl.tensor,
    stride_pm: tl.tensor,
    stride_pk: tl.tensor,
    stride_qk: tl.tensor,
    stride_qn: tl.tensor,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """`acc + (P * c) Q`, P [M, K] and Q [K, N]; c [K] fp32 scales P's columns unless p_c is None."""
    for i_k in range(tl.cdiv(K, BLOCK_K)):
        o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < K
        b_p = tl.load(
            p_p + o_m[:, None] * stride_pm + o_k[None, :] * stride_pk,
            mask=m_m[:, None] & m_k[None, :],
            other=0.0,
        )
        b_q = tl.load(
            p_q + o_k[:, None] * stride_qk + o_n[None, :] * stride_qn,
            mask=m_k[:, None] & m_n[None, :],
            other=0.0,
        )
        if p_c is not None:
            # The vector, not m and n: an exact division for each of a thread's 16 columns took 480 of the 656
            # instructions of a step of 128x256x64 on sm_90.
            b_c = tl.load(p_c + o_k, mask=m_k, other=0.0)
            b_p = (b_p.to(tl.float32) * b_c[None, :]).to(b_q.dtype)
        b_acc = tl.dot(b_p, b_q, b_acc, input_precision="ieee")
    return b_acc


@triton.jit  # type: ignore[untyped-decorator]
def split_columns(b: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    """The block [M, N] as PARTS (a power of two) blocks of N / PARTS neighbouring columns.

    An epilogue that goes through a tile part by part holds the operands of one part in registers at a time.
    """
    if PARTS == 1:
        b_parts = (b,)
    else:
        b_first, b_second = tl.split(tl.permute(tl.reshape(b, (b.shape[0], 2, b.shape[1] // 2)), (0, 2, 1)))
        b_parts = split_columns(b_first, PARTS // 2) + split_columns(b_second, PARTS // 2)
    return b_parts


@triton.jit  # type: ignore[untyped-decorator]
def part_columns(
    i_n: tl.tensor, i_part: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr
) -> tl.tensor:
    """Columns, in int64, of part `i_part` of the tile `i_n`."""
    return i_n.to(tl.int64) * BLOCK_N + i_part * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)


@triton.jit  # type: ignore[untyped-decorator]
def add_input_gradient(
    b_acc: tl.tensor,
    p_ds: tl.tensor,
    p_a: tl.tensor,
    p_packed: tl.tensor,
    o_m: tl.tensor,
    m_m: tl.tensor,
    o_k: tl.tensor,
    i_first_column: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_sm: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    keep_scale: tl.tensor,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """`acc + mask * (dS A) / (1 - p)` for the columns o_k; dS [M, r], unit columns; p_packed may be None."""
    m_k = o_k < K
    if p_packed is None:
        b_acc = low_product(
            b_acc, p_ds, p_a, o_m, m_m, o_k, m_k, R, stride_sm, 1, stride_ar, stride_ak, BLOCK_R
        )
    else:
        n_group = tl.cdiv(K, 4)
        o_group = (i_first_column // 4 + tl.arange(0, o_k.shape[0] // 4)).to(tl.int64)
        b_packed = tl.load(
            p_packed + o_m[:, None] * n_group + o_group[None, :],
            mask=m_m[:, None] & (o_group < n_group)[None, :],
            other=0,
        )
        b_low = tl.zeros(b_acc.shape, dtype=tl.float32)
        b_low = low_product(
            b_low, p_ds, p_a, o_m, m_m, o_k, m_k, R, stride_sm, 1, stride_ar, stride_ak, BLOCK_R
        )
        b_acc += tl.where(unpack_mask(b_packed), b_low, 0.0) * keep_scale
    return b_acc


@triton.jit  # type: ignore[untyped-decorator]
def add_low_rank(
    b_acc: tl.tensor,
    p_s: tl.tensor,
    p_b: tl.tensor,
    o_m: tl.tensor,
    m_m: tl.tensor,
    o_n: tl.tensor,
    m_n: tl.tensor,
    R: tl.tensor,
    offset_s: tl.tensor,
    stride_sm: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    scale: tl.tensor,
    inverse_scale: tl.tensor,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """`acc + scale S B^T`, S from column offset_s on; acc itself when p_b is None."""
    if p_b is not None:
        # The rank-r product is accumulated on top of the base product, a second accumulator would spill:
        # `(acc / scale + S B^T) * scale` costs two fp32 roundings instead of one of scale * S to 16 bits.
        b_acc *= inverse_scale
        p_l = p_s + offset_s
        b_acc = low_product(
            b_acc, p_l, p_b, o_m, m_m, o_n, m_n, R, stride_sm, 1, stride_br, stride_bn, BLOCK_R
        )
        b_acc *= scale
    return b_acc


@triton.jit  # type: ignore[untyped-decorator]
def finish_product(
    b_z: tl.tensor,
    p_bias: tl.tensor,
    p_magnitude: tl.tensor,
    p_norm: tl.tensor,
    p_y: tl.tensor,
    p_z: tl.tensor,
    o_m: tl.tensor,
    m_m: tl.tensor,
    o_n: tl.tensor,
    m_n: tl.tensor,
    N: tl.tensor,
    stride_bias: tl.tensor,
    stride_magnitude: tl.tensor,
) -> tl.tensor:
    """`y = c z + bias`, returned in fp32; y and z [M, N], contiguous, are stored where there is a pointer."""
    o_tile = o_m[:, None] * N + o_n[None, :]
    m_tile = m_m[:, None] & m_n[None, :]
    if p_z is not None:
        tl.store(p_z + o_tile, b_z.to(p_z.dtype.element_ty), mask=m_tile)
    b_y = b_z
    if p_norm is not None:
        b_c, _ = load_row_scale(p_magnitude, p_norm, stride_magnitude, o_n, m_n)
        b_y *= b_c[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if p_y is not None:
        tl.store(p_y + o_tile, b_y.to(p_y.dtype.element_ty), mask=m_tile)
    return b_y


def product_arguments(projections: Sequence[Projection]) -> dict[str, tuple[object, ...]]:
    """What the product of each projection reads, as tuples under the kernels' argument names.

    A scaling below 1e-30 in size counts as zero, an empty rank loop: its reciprocal times the accumulator
    could leave fp32's range.
    """
    ranks = [0 if p.lora_A is None else p.lora_A.shape[0] for p in projections]
    scales = [float(p.scaling) if abs(p.scaling) >= 1e-30 else 0.0 for p in projections]
    strides_b = [(0, 0) if p.lora_B is None else p.lora_B.stride() for p in projections]
    return {
        "p_w": tuple(p.weight for p in projections),
        "p_b": tuple(p.lora_B for p in projections),
        "p_bias": tuple(p.bias for p in projections),
        "p_magnitude": tuple(p.magnitude for p in projections),
        "p_norm": tuple(p.norm for p in projections),
        "N": tuple(p.weight.shape[0] for p in projections),
        "R": tuple(rank if scale else 0 for rank, scale in zip(ranks, scales, strict=True)),
        "stride_wn": tuple(p.weight.stride(0) for p in projections),
        "stride_wk": tuple(p.weight.stride(1) for p in projections),
        "offset_s": tuple(accumulate(ranks[:-1], initial=0)),
        "stride_bn": tuple(stride[0] for stride in strides_b),
        "stride_br": tuple(stride[1] for stride in strides_b),
        "stride_bias": tuple(0 if p.bias is None else p.bias.stride(0) for p in projections),
        "stride_magnitude": tuple(0 if p.magnitude is None else p.magnitude.stride(0) for p in projections),
        "scale": tuple(scale or 1.0 for scale in scales),
        "inverse_scale": tuple(1.0 / (scale or 1.0) for scale in scales),
    }


def rank_tile(config: configs.KernelConfig, projections: Sequence[Projection]) -> int:
    """One tile of the rank for all projections, from the largest rank."""
    return config.r_tile(max(1 if p.lora_A is None else p.lora_A.shape[0] for p in projections))


def select_tile(kernel: str, m: int, widths: Sequence[int], *wide: Tensor) -> configs.KernelConfig:
    """The largest tile of which the outputs [m, n in widths] have one for each unit, else the smallest."""
    candidates = configs.rows(kernel, *wide)
    units = launch.unit_count(wide[0].device)
    for row in candidates:
        if launch.cdiv(m, row.block_m) * sum(launch.cdiv(n, row.block_n) for n in widths) >= units:
            return row
    return candidates[-1]
