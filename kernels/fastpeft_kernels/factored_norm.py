"""DoRA's `n = ||W + s B A||` of each row, factored: neither B A [N, K] nor U = W A^T [N, r] is written.

Liu et al. 2024, arXiv 2402.09353; the factored form is arXiv 2603.22276's::

    n^2 = ||W||^2 + rowsum(s B * (2 U + s B G))        U = W A^T [N, r]     G = A A^T [r, r]

A program owns BLOCK_N rows of W. It reads them once, and that one read gives U on tensor cores and ||W||^2
in fp32; both stay in registers. G is summed in the same loop from the same tiles of A while it fits beside U
(r up to 64); above that it is a launch of its own, [r, r] in fp32, and a rank above the tile reads its rows
of W once for each rank tile, from L2 after the first.

Few rows are not split along K: partial sums of U are [N, r] and would have to be written. Programs take fewer
rows instead, down to the 16 of a tensor core's tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .down_projection import down_projection

# The largest rank tile whose [r, r] accumulator is summed beside U: 16 to 32 registers a thread at 64.
MAX_GRAM_TILE = 64

# Step of B G, whose fp32 operands all sit in registers: in one step of 128, 20 KiB of them spilled.
BLOCK_J = 32


@triton.jit  # type: ignore[untyped-decorator]
def norm_of_rows(
    i_n: tl.tensor,
    p_w: tl.tensor,
    p_a: tl.tensor,
    p_b: tl.tensor,
    p_gram: tl.tensor,
    p_norm: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    scaling: tl.tensor,
    HAS_GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """Write n of tile i_n of N; gram [R, R] fp32 contiguous if HAS_GRAM, else R is at most BLOCK_R."""
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_product = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for i_r in range(tl.cdiv(R, BLOCK_R)):
        o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        m_r = o_r < R
        b_u = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        b_gram = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
        for i_k in range(tl.cdiv(K, BLOCK_K)):
            o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
            m_k = o_k < K
            b_w = tl.load(
                p_w + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk,
                mask=m_n[:, None] & m_k[None, :],
                other=0.0,
            )
            b_a = tl.load(
                p_a + o_r[:, None] * stride_ar + o_k[None, :] * stride_ak,
                mask=m_r[:, None] & m_k[None, :],
                other=0.0,
            ).to(b_w.dtype)
            b_u = tl.dot(b_w, tl.trans(b_a), b_u, input_precision="ieee")
            if not HAS_GRAM:
                b_gram = tl.dot(b_a, tl.trans(b_a), b_gram, input_precision="ieee")
            if i_r == 0:
                b_wide = b_w.to(tl.float32)
                b_squares += tl.sum(b_wide * b_wide, axis=1)

        p_rows = p_b + o_n[:, None] * stride_bn
        m_nr = m_n[:, None] & m_r[None, :]
        b_b = tl.load(p_rows + o_r[None, :] * stride_br, mask=m_nr, other=0.0).to(tl.float32) * scaling
        b_u *= 2.0
        if HAS_GRAM:
            for i_j in tl.range(0, tl.cdiv(R, BLOCK_J), num_stages=1):
                o_j = (i_j * BLOCK_J + tl.arange(0, BLOCK_J)).to(tl.int64)
                m_j = o_j < R
                b_bj = tl.load(p_rows + o_j[None, :] * stride_br, mask=m_n[:, None] & m_j[None, :], other=0.0)
                b_part = tl.load(
                    p_gram + o_j[:, None] * R + o_r[None, :], mask=m_j[:, None] & m_r[None, :], other=0.0
                )
                b_u = tl.dot(b_bj.to(tl.float32) * scaling, b_part, b_u, input_precision=PRECISION)
        else:
            b_u = tl.dot(b_b, b_gram, b_u, input_precision=PRECISION)
        b_product += tl.sum(b_b * b_u, axis=1)
    # Rounding can leave a sum just below zero where s B A all but cancels W.
    tl.store(p_norm + o_n, tl.sqrt(tl.maximum(b_squares + b_product, 0.0)), mask=m_n)


@triton.jit  # type: ignore[untyped-decorator]
def row_norm_kernel(
    p_w: tl.tensor,
    p_a: tl.tensor,
    p_b: tl.tensor,
    p_gram: tl.tensor,
    p_norm: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    scaling: tl.tensor,
    HAS_GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """Program (tile of N)."""
    norm_of_rows(
        tl.program_id(0),
        p_w,
        p_a,
        p_b,
        p_gram,
        p_norm,
        N,
        K,
        R,
        stride_wn,
        stride_wk,
        stride_ar,
        stride_ak,
        stride_bn,
        stride_br,
        scaling,
        HAS_GRAM,
        PRECISION,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
        BLOCK_J,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NormLaunch:
    """What a launch of a kernel around `norm_of_rows` needs beside its operands.

    Attributes:
        gram: A A^T [r, r] in fp32 where it is not summed beside U; a launch of its own made it.
        tiles: programs that a norm needs.
        constants: compile-time arguments and launch options.
    """

    gram: Tensor | None
    tiles: int
    constants: dict[str, Any]


def norm_launch(weight: Tensor, lora_A: Tensor) -> NormLaunch:
    """Choose tiles for `||weight + s B lora_A||`, and make the Gram matrix where it is not made inside."""
    r = lora_A.shape[0]
    config = configs.select_row_norm(weight, r, launch.unit_count(weight.device))
    has_gram = r > config.block_r or config.r_tile(r) > MAX_GRAM_TILE
    # B G is a product of fp32 matrices: in three tf32 products where only those have tensor cores.
    is_nvidia = configs.architecture(weight.device).startswith("sm_")
    precision = "tf32x3" if is_nvidia and weight.dtype != torch.float32 else "ieee"
    gram = None
    if has_gram:
        A = lora_A.to(weight.dtype)
        gram = down_projection(A, A, 1.0, dtype=torch.float32)
    constants = {
        "HAS_GRAM": has_gram,
        "PRECISION": precision,
        "BLOCK_N": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_R": config.r_tile(r),
        "BLOCK_J": BLOCK_J,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": launch.FP_FUSION,
        **configs.all_registers(weight.device),
    }
    return NormLaunch(gram=gram, tiles=launch.cdiv(weight.shape[0], config.block_m), constants=constants)


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`n [N] = ||weight [N, K] + scaling * lora_B [N, r] lora_A [r, K]||` of each row, fp32.

    Any strides (Conv1D's transposed view included). The adapters may be fp32 under a 16-bit weight; A is
    converted to the weight's dtype in registers, as the forward's product does, B is not. Where r is above
    the table's last rank tile with a Gram matrix inside, two launches, else one.
    """
    n, k = weight.shape
    with launch.on_device(weight):
        norm = launch.empty((n,), torch.float32, weight)
        plan = norm_launch(weight, lora_A)
        row_norm_kernel[(plan.tiles,)](
            weight,
            lora_A,
            lora_B,
            plan.gram,
            norm,
            n,
            k,
            lora_A.shape[0],
            weight.stride(0),
            weight.stride(1),
            lora_A.stride(0),
            lora_A.stride(1),
            lora_B.stride(0),
            lora_B.stride(1),
            float(scaling),
            **plan.constants,
        )
    return norm
