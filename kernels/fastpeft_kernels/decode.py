"""LoRA's and DoRA's forward for 1 to 16 tokens, in one launch: inference with unmerged adapters.

So few tokens cost what the read of W costs, so that read is spread over the whole device and happens once. A
program owns BLOCK_N rows of W and a run of K, and makes `x W^T + s S B^T` of that run, S = x A^T of it too:
linear in the run, so the program that finishes last in its column tile adds the fp32 partials in their order
and applies c and the bias. Tokens are padded to the 16 rows of the tensor cores' smallest tile.

DoRA's norm is read, not made: it is the same for every token, and summing it here costs a product of W's size
times r a step, and registers (at r = 64 no tile tried on gfx1100 compiled without spills).

Bytes at M = 16, N = K = 4096, r = 16, bf16 under fp32 adapters, BLOCK_N = 64, 132 multiprocessors (4 splits):

    from memory     W 32 MiB, x 0.13, A 0.25, B 0.25, y 0.13     each once: 32.8 MiB, W is 98 %
    from L2         x and A once more in each of the 64 column tiles: 24 MiB; partials 1 MiB written and read
    launches        1, against base + 2 (S = x A^T; y += s S B^T)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .check import check_operands, check_row_scale
from .factored_norm import row_norm
from .finish import is_last
from .primitives import load_row_scale
from .when import MAX_DECODE_TOKENS, MAX_RANK

# Two programs a multiprocessor: the loads of one run while the other finishes.
PROGRAMS_PER_UNIT = 2


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def decode_kernel(
    p_x: tl.tensor,
    p_w: tl.tensor,
    p_a: tl.tensor,
    p_b: tl.tensor,
    p_bias: tl.tensor,
    p_m: tl.tensor,
    p_norm: tl.tensor,
    p_y: tl.tensor,
    p_partial: tl.tensor,
    p_counter: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    stride_bias: tl.tensor,
    stride_m: tl.tensor,
    tiles_per_split: tl.tensor,
    scale: tl.tensor,
    HAS_BIAS: tl.constexpr,
    HAS_MAGNITUDE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of N, split of K); y [M, N] and partial [splits, M, N] are contiguous."""
    i_n = tl.program_id(0)
    i_split = tl.program_id(1)
    o_m = tl.arange(0, BLOCK_M).to(tl.int64)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    m_m = o_m < M
    m_n = o_n < N
    m_r = o_r < R

    # B before the loop: after it, every program would wait for memory once more.
    b_b = tl.load(
        p_b + o_n[:, None] * stride_bn + o_r[None, :] * stride_br,
        mask=m_n[:, None] & m_r[None, :],
        other=0.0,
    ).to(p_x.dtype.element_ty)
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(K, BLOCK_K))
    for i_k in range(first, last):
        o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        m_k = o_k < K
        b_x = tl.load(
            p_x + o_m[:, None] * stride_xm + o_k[None, :] * stride_xk,
            mask=m_m[:, None] & m_k[None, :],
            other=0.0,
        )
        b_w = tl.load(
            p_w + o_n[:, None] * stride_wn + o_k[None, :] * stride_wk,
            mask=m_n[:, None] & m_k[None, :],
            other=0.0,
        )
        b_a = tl.load(
            p_a + o_r[:, None] * stride_ar + o_k[None, :] * stride_ak,
            mask=m_r[:, None] & m_k[None, :],
            other=0.0,
        ).to(b_x.dtype)
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, input_precision="ieee")
        b_s = tl.dot(b_x, tl.trans(b_a), b_s, input_precision="ieee")
    b_acc += tl.dot(b_s.to(b_b.dtype), tl.trans(b_b), input_precision="ieee") * scale

    o_tile = o_m[:, None] * N + o_n[None, :]
    m_tile = m_m[:, None] & m_n[None, :]
    is_writer = True
    if IS_SPLIT:
        n_splits = tl.num_programs(1)
        stride_split = tl.cast(M, tl.int64) * N
        tl.store(p_partial + i_split * stride_split + o_tile, b_acc, mask=m_tile)
        is_writer = is_last(p_counter + i_n, n_splits)
        if is_writer:
            b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for i in range(n_splits):
                b_acc += tl.load(
                    p_partial + i * stride_split + o_tile, mask=m_tile, other=0.0, cache_modifier=".cg"
                )
    if is_writer:
        if HAS_MAGNITUDE:
            b_c, _ = load_row_scale(p_m, p_norm, stride_m, o_n, m_n)
            b_acc *= b_c[None, :]
        if HAS_BIAS:
            b_acc += tl.load(p_bias + o_n * stride_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
        tl.store(p_y + o_tile, b_acc.to(p_y.dtype.element_ty), mask=m_tile)


def lora_decode(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """`y = x W^T + scaling * (x A^T) B^T + bias`, [M, N] in x's dtype, for M up to MAX_DECODE_TOKENS.

    Arguments as `lora.lora_forward`; ValueError for more tokens, or for r above MAX_RANK.
    """
    return _launch(x, weight, bias, lora_A, lora_B, None, None, scaling)


def dora_decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float,
) -> Tensor:
    """`y = magnitude / ||W + scaling * B A|| * (x W^T + scaling * (x A^T) B^T) + bias` for few tokens.

    norm: [N] fp32 from `row_norm`, to be kept between tokens; None makes it anew, a launch and a read of W.
    The rest as `lora_decode`.
    """
    norm = row_norm(weight, lora_A, lora_B, float(scaling)) if norm is None else norm
    check_row_scale(weight, magnitude, norm)
    return _launch(x, weight, bias, lora_A, lora_B, magnitude, norm, scaling)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    norm: Tensor | None,
    scaling: float,
) -> Tensor:
    check_operands("x", x, weight.shape[1], weight, lora_A, lora_B, 0.0, None)
    (m, k), n, r = x.shape, weight.shape[0], lora_A.shape[0]
    if m > MAX_DECODE_TOKENS or r > MAX_RANK:
        raise ValueError(
            f"decoding takes up to {MAX_DECODE_TOKENS} tokens and r up to {MAX_RANK}, got {m} and {r}"
        )
    y = launch.empty((m, n), x.dtype, x)
    if m == 0:
        return y
    config = configs.rows(configs.DECODE, x, weight)[0]
    tiles_n = launch.cdiv(n, config.block_n)
    units = PROGRAMS_PER_UNIT * launch.unit_count(x.device)
    splits, per_split = launch.split_reduction(tiles_n, launch.cdiv(k, config.block_k), units)
    is_split = splits > 1
    partial = launch.empty((splits, m, n), launch.PARTIAL_DTYPE, x) if is_split else None
    with launch.on_device(x):
        decode_kernel[(tiles_n, splits)](
            x,
            weight,
            lora_A,
            lora_B,
            bias,
            magnitude,
            norm,
            y,
            partial,
            launch.counters(tiles_n, x) if is_split else None,
            m,
            n,
            k,
            r,
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            weight.stride(1),
            lora_A.stride(0),
            lora_A.stride(1),
            lora_B.stride(0),
            lora_B.stride(1),
            bias.stride(0) if bias is not None else 0,
            magnitude.stride(0) if magnitude is not None else 0,
            per_split,
            float(scaling),
            HAS_BIAS=bias is not None,
            HAS_MAGNITUDE=magnitude is not None,
            IS_SPLIT=is_split,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_R=config.r_tile(r),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=launch.FP_FUSION,
        )
    return y
