"""DoRA's row norm for a caller that keeps it: proved fresh on the device, made anew only where it is stale.

Nothing that the host sees proves that A, B and W are what they were: writes through `.data`, fused
optimisers and FSDP2's all-gathers leave every sign as it was. And the host cannot ask for values without
waiting for the device. So one launch does both: its first programs take a fingerprint of what is there now
and compare it with the last launch's; the others wait for all of those, and then copy the norm that was
kept or make it anew.

*The fingerprint* is of every bit of A and of B, and of one element of every row and of every column of W
(what `fastpeft.layers.norm_cache` compares on a CPU). A checking program has two sums of its words, each
mixed with its place by a bijection: to change one word always changes both sums; to change several leaves
both as they were once in 2^64. Where one program of all finds a difference, every row is made anew.

*Waiting is safe*: a program's role is its ticket, drawn from a counter when it starts. Who waits has drawn
a later ticket than all that it waits for: they run already, and they wait for nobody. That all programs fit
on the device at once is not needed.

*Nothing kept is written again*: each launch leaves a norm and fingerprints of its own. What an earlier
forward saved for its backward stays, and two threads that start from one kept norm do not disturb each
other.

Bytes at N = K = 4096, r = 16, bf16 under fp32 adapters, where nothing changed: A and B 0.5 MiB, W's sample
0.13 (a 32-byte sector an element), n 0.03; against the 32 MiB of W.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .factored_norm import norm_launch, norm_of_rows
from .finish import is_last

# Words that one checking program takes at a time.
BLOCK_WORDS = 1024

# A program adds 1 where it found its words as they were, and this besides where it did not. There are at most
# some hundreds of them, one a multiprocessor: neither sum runs over.
CHANGED = tl.constexpr(1 << 16)


@triton.jit  # type: ignore[untyped-decorator]
def mixed(
    b_word: tl.tensor,
    SHIFT: tl.constexpr,
    FIRST: tl.constexpr,
    MIDDLE: tl.constexpr,
    SECOND: tl.constexpr,
    LAST: tl.constexpr,
) -> tl.tensor:
    """A bijection of 32-bit words in which every bit of the result depends on every bit of the word."""
    b_word ^= b_word >> SHIFT
    b_word *= FIRST
    b_word ^= b_word >> MIDDLE
    b_word *= SECOND
    return b_word ^ (b_word >> LAST)


@triton.jit  # type: ignore[untyped-decorator]
def add_words(
    b_one: tl.tensor,
    b_two: tl.tensor,
    p_values: tl.tensor,
    o_values: tl.tensor,
    m_values: tl.tensor,
    b_place: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The two sums with the words at `o_values`, which have the places `b_place`, added to them."""
    b_values = tl.load(p_values + o_values, mask=m_values, other=0.0)
    if p_values.dtype.element_ty.primitive_bitwidth == 32:
        b_word = b_values.to(tl.uint32, bitcast=True)
    else:
        b_word = b_values.to(tl.uint16, bitcast=True).to(tl.uint32)
    # The finalisers of MurmurHash3 and of "lowbias32": for two places to exchange what they add, their words
    # would have to suit both keys.
    b_key = mixed(b_place, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)
    b_first = mixed(b_word ^ b_key, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)
    b_key = mixed(b_place, 16, 0x7FEB352D, 15, 0x846CA68B, 16)
    b_second = mixed(b_word ^ b_key, 16, 0x7FEB352D, 15, 0x846CA68B, 16)
    return b_one + tl.where(m_values, b_first, 0), b_two + tl.where(m_values, b_second, 0)


@triton.jit  # type: ignore[untyped-decorator]
def fingerprint(
    i_check: tl.tensor,
    n_checks: tl.tensor,
    p_w: tl.tensor,
    p_a: tl.tensor,
    p_b: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    stride_wn: tl.tensor,
    stride_wk: tl.tensor,
    stride_ar: tl.tensor,
    stride_ak: tl.tensor,
    stride_bn: tl.tensor,
    stride_br: tl.tensor,
    words_w: tl.tensor,
    BLOCK_WORDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Two sums over this program's part of A, of B and of W's sample."""
    o_block = tl.arange(0, BLOCK_WORDS)
    b_one = tl.zeros((BLOCK_WORDS,), dtype=tl.uint32)
    b_two = tl.zeros((BLOCK_WORDS,), dtype=tl.uint32)
    words_a = R * K
    words_b = N * R
    for i in range(i_check, tl.cdiv(words_a, BLOCK_WORDS), n_checks):
        o_word = i * BLOCK_WORDS + o_block
        o_a = (o_word // K).to(tl.int64) * stride_ar + (o_word % K).to(tl.int64) * stride_ak
        b_one, b_two = add_words(b_one, b_two, p_a, o_a, o_word < words_a, o_word.to(tl.uint32))
    for i in range(i_check, tl.cdiv(words_b, BLOCK_WORDS), n_checks):
        o_word = i * BLOCK_WORDS + o_block
        o_b = (o_word // R).to(tl.int64) * stride_bn + (o_word % R).to(tl.int64) * stride_br
        b_place = (o_word + words_a).to(tl.uint32)
        b_one, b_two = add_words(b_one, b_two, p_b, o_b, o_word < words_b, b_place)
    # The diagonal, continued through the whole matrix: every row and every column is met.
    for i in range(i_check, tl.cdiv(words_w, BLOCK_WORDS), n_checks):
        o_word = i * BLOCK_WORDS + o_block
        o_w = (o_word % N).to(tl.int64) * stride_wn + (o_word % K).to(tl.int64) * stride_wk
        b_place = (o_word + (words_a + words_b)).to(tl.uint32)
        b_one, b_two = add_words(b_one, b_two, p_w, o_w, o_word < words_w, b_place)
    return tl.sum(b_one.to(tl.int64), axis=0), tl.sum(b_two.to(tl.int64), axis=0)


@triton.jit(do_not_specialize=["words_w", "n_checks", "n_tiles"])  # type: ignore[untyped-decorator]
def kept_norm_kernel(
    p_w: tl.tensor,
    p_a: tl.tensor,
    p_b: tl.tensor,
    p_gram: tl.tensor,
    p_kept_norm: tl.tensor,
    p_kept_prints: tl.tensor,
    p_norm: tl.tensor,
    p_prints: tl.tensor,
    p_counter: tl.tensor,
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
    words_w: tl.tensor,
    n_checks: tl.tensor,
    n_tiles: tl.tensor,
    HAS_KEPT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    HAS_GRAM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """By ticket: n_checks programs that check, then one for each tile of N.

    counter [3]: tickets drawn; checks done, and CHANGED for each that found a difference; programs done. All
    are left at zero. norm [N] fp32 and prints [n_checks, 2] int64 are contiguous.
    """
    ticket = tl.atomic_add(p_counter, 1, sem="relaxed", scope="gpu")
    if ticket < n_checks:
        one, two = fingerprint(
            ticket,
            n_checks,
            p_w,
            p_a,
            p_b,
            N,
            K,
            R,
            stride_wn,
            stride_wk,
            stride_ar,
            stride_ak,
            stride_bn,
            stride_br,
            words_w,
            BLOCK_WORDS,
        )
        tl.store(p_prints + 2 * ticket, one)
        tl.store(p_prints + 2 * ticket + 1, two)
        if HAS_KEPT:
            same = (tl.load(p_kept_prints + 2 * ticket) == one) & (
                tl.load(p_kept_prints + 2 * ticket + 1) == two
            )
            tl.atomic_add(p_counter + 1, tl.where(same, 1, 1 + CHANGED), sem="release", scope="gpu")
    else:
        i_n = ticket - n_checks
        is_stale = True
        if HAS_KEPT:
            checks = tl.atomic_add(p_counter + 1, 0, sem="acquire", scope="gpu")
            while checks % CHANGED < n_checks:
                checks = tl.atomic_add(p_counter + 1, 0, sem="acquire", scope="gpu")
            is_stale = checks >= CHANGED
        if is_stale:
            norm_of_rows(
                i_n,
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
        elif HAS_KEPT:
            o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            tl.store(p_norm + o_n, tl.load(p_kept_norm + o_n, mask=m_n, other=0.0), mask=m_n)
    if is_last(p_counter + 2, n_checks + n_tiles):
        tl.store(p_counter, 0)
        tl.store(p_counter + 1, 0)


def kept_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    kept: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`row_norm`, W read only where A, B or W's sample are not what they were when `kept` was made.

    One launch, and one more where `row_norm` takes two.

    Args:
        weight: [N, K], any strides.
        lora_A: [r, K], in weight's dtype or fp32, any strides.
        lora_B: [N, r], likewise.
        scaling: s; with `kept`, the same as then.
        kept: what an earlier call on tensors of these shapes, dtypes and this device returned, on the same
            stream; it is not changed. None makes the norm.

    Returns: (n [N] in fp32, the fingerprints to hand in with it the next time).
    """
    (n, k), r = weight.shape, lora_A.shape[0]
    if lora_A.shape != (r, k) or lora_B.shape != (n, r):
        raise ValueError(
            f"expected lora_A [r, {k}] and lora_B [{n}, r], got {list(lora_A.shape)} and {list(lora_B.shape)}"
        )
    words_w = max(n, k) if n and k else 0
    words = r * k + n * r + words_w
    with launch.on_device(weight):
        checks = max(1, min(launch.unit_count(weight.device), launch.cdiv(words, BLOCK_WORDS)))
        norm = launch.empty((n,), torch.float32, weight)
        prints = launch.empty((checks, 2), torch.int64, weight)
        if kept is not None and (kept[0].shape != norm.shape or kept[1].shape != prints.shape):
            raise ValueError(
                f"expected kept a norm [{n}] and fingerprints [{checks}, 2], got {list(kept[0].shape)} and "
                f"{list(kept[1].shape)}"
            )
        if words >= 2**31 - BLOCK_WORDS:
            raise ValueError(f"the fingerprint counts in 32 bits: {words} words of A, B and W are too many")
        plan = norm_launch(weight, lora_A)
        kept_norm_kernel[(checks + plan.tiles,)](
            weight,
            lora_A,
            lora_B,
            plan.gram,
            None if kept is None else kept[0],
            None if kept is None else kept[1],
            norm,
            prints,
            launch.counters(3, weight),
            n,
            k,
            r,
            weight.stride(0),
            weight.stride(1),
            lora_A.stride(0),
            lora_A.stride(1),
            lora_B.stride(0),
            lora_B.stride(1),
            float(scaling),
            words_w,
            checks,
            plan.tiles,
            HAS_KEPT=kept is not None,
            BLOCK_WORDS=BLOCK_WORDS,
            **plan.constants,
        )
    return norm, prints
