"""Whether a CPU multiplies 16-bit matrices faster as they are or in fp32 (:mod:`fastpeft.ops.blocked`).

Matrix units (AMX) make 16-bit products several times faster than fp32 ones; vector units alone may make
them slower, and a CPU without 16-bit arithmetic much slower: at 64 x 768 x 768 oneDNN's ``dY W`` ran at 1.1
GFLOP/s there, its ``x W^T`` at 10, and either in fp32, casts included, at 69 (an AVX2 EPYC, one thread). So
without AMX it is measured from how many tokens on fp32 wins, the cast of W included: once in a process for
either product, when the first one is due, and logged.
``FASTPEFT_CPU_GEMM=native`` or ``fp32`` decides without a measurement; set it where several processes must
agree to the last bit.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import ConfigError

logger = logging.getLogger("fastpeft")
ENVIRONMENT_VARIABLE = "FASTPEFT_CPU_GEMM"
CHOICES = ("auto", "native", "fp32")
# fp32 must win by this much, so that noise cannot choose the path that also casts.
MARGIN = 1.25
# Tokens that are tried, the fewest first. What the cast costs does not grow with them: where fp32 wins, it
# wins from there on.
LADDER = (1, 4, 16, 64, 256)
# With FASTPEFT_CPU_GEMM=fp32, for both products: for fewer, what takes the time is the cast of W.
FORCED_FROM = 4
NEVER = 2**62
_FOUND: dict[tuple[torch.dtype, bool], int] = {}
_MEASURING = threading.Lock()


def products_in_fp32(x: Tensor, *, backward: bool = False) -> bool:
    """Whether the torch backend should multiply ``x`` [tokens, features] in fp32 blocks of W.

    Args:
        x: the input; dY, where the product is backward's.
        backward: whether the product is ``dY W``, not ``x W^T``.
    """
    sixteen_bits = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cpu and sixteen_bits and x.shape[0] >= fp32_from(x.dtype, backward)


def fp32_is_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU's fp32 products are clearly faster than a 16-bit dtype's, forward, from some size on.

    Raises:
        ConfigError: ``FASTPEFT_CPU_GEMM`` holds something else than a choice.
    """
    return fp32_from(dtype, False) < NEVER


def fp32_from(dtype: torch.dtype, backward: bool) -> int:
    """From how many tokens products of a 16-bit dtype are clearly slower than fp32 ones with a cast of W.

    Raises:
        ConfigError: ``FASTPEFT_CPU_GEMM`` holds something else than a choice.
    """
    key = (dtype, backward)
    if key not in _FOUND:
        with _MEASURING:  # of threads that ask at once, all have the one answer
            if key not in _FOUND:
                _FOUND[key] = _fp32_from(dtype, backward)
    return _FOUND[key]


def _fp32_from(dtype: torch.dtype, backward: bool) -> int:
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "native" or (choice == "auto" and _has_matrix_units(dtype)):
        return NEVER
    if choice == "fp32":
        return FORCED_FROM
    product = "dY W" if backward else "x W^T"
    for tokens in LADDER:
        own, wide = _least_seconds(dtype, tokens, backward)
        if own > MARGIN * wide:
            logger.info(
                "fastpeft: %s in fp32 from %d tokens, where it took %.2f times as long in %s",
                product, tokens, own / wide, dtype,
            )  # fmt: skip
            return tokens
    logger.info("fastpeft: %s in %s", product, dtype)
    return NEVER


def _has_matrix_units(dtype: torch.dtype) -> bool:
    return dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def _least_seconds(dtype: torch.dtype, tokens: int, backward: bool, repeats: int = 10) -> tuple[float, float]:
    """Return the least times of a product of [tokens, 768] and [768, 768], as it is and in fp32, in turns."""
    # Not random: the caller's generator must not move. Not constant: zeros multiply faster than data.
    # On the CPU whatever the default device and dtype are.
    on_cpu: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    x = torch.linspace(-1.0, 1.0, tokens * 768, **on_cpu).reshape(tokens, 768).to(dtype)
    weight = torch.linspace(-1.0, 1.0, 768 * 768, **on_cpu).reshape(768, 768).to(dtype)
    W = weight if backward else weight.t()
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: x @ W,
        lambda: (x.float() @ W.float()).to(dtype),
    )
    least = [float("inf")] * len(ways)
    with torch.no_grad():
        for turn in range(repeats + 1):
            for i, way in enumerate(ways):
                start = time.perf_counter()
                way()
                if turn:  # the first one warms up
                    least[i] = min(least[i], time.perf_counter() - start)
    return least[0], least[1]
