"""Whether a CPU multiplies 16-bit matrices faster as they are or in fp32 (:mod:`fastpeft.ops.blocked`).

Matrix units (AMX) make 16-bit products several times faster than fp32 ones; vector units alone may make
them slower, and a CPU without 16-bit arithmetic much slower. Without AMX it is measured, once in a process,
when the first 16-bit product is due, and logged. ``FASTPEFT_CPU_GEMM=native`` or ``fp32`` decides without a
measurement; set it where several processes must agree to the last bit.
"""

from __future__ import annotations

import logging
import os
import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import ConfigError

logger = logging.getLogger("fastpeft")
ENVIRONMENT_VARIABLE = "FASTPEFT_CPU_GEMM"
CHOICES = ("auto", "native", "fp32")
# fp32 must win by this much, so that noise cannot choose the path that also casts.
MARGIN = 1.25
# Tokens below which casting W costs more than the faster product saves: one cast of an element of W (about
# 0.3 ns) buys 0.01 ns a token, at the rates in blocked.py.
MIN_TOKENS = 64


def products_in_fp32(x: Tensor) -> bool:
    """Whether the torch backend should multiply ``x`` [tokens, in_features] in fp32 blocks."""
    sixteen_bits = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cpu and sixteen_bits and x.shape[0] >= MIN_TOKENS and fp32_is_faster(x.dtype)


@cache
def fp32_is_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU's fp32 products are clearly faster than those of a 16-bit dtype.

    Raises:
        ConfigError: ``FASTPEFT_CPU_GEMM`` holds something else than a choice.
    """
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ConfigError(f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(CHOICES)}, got {choice!r}")
    if choice != "auto":
        return choice == "fp32"
    if dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return False
    own, wide = _least_seconds((dtype, torch.float32))
    logger.info("fastpeft: %s products took %.2f times as long as fp32 ones", dtype, own / wide)
    return own > MARGIN * wide


def _least_seconds(dtypes: tuple[torch.dtype, ...], repeats: int = 10) -> list[float]:
    """Return, per dtype, the least time of a product of [256, 768] and [768, 768], taken in turns."""
    # Not random: the caller's generator must not move. Not constant: zeros multiply faster than data.
    # In fp32 on the CPU whatever the default device and dtype are.
    on_cpu: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    x = torch.linspace(-1.0, 1.0, 256 * 768, **on_cpu).reshape(256, 768)
    weight = torch.linspace(-1.0, 1.0, 768 * 768, **on_cpu).reshape(768, 768)
    operands = [(x.to(dtype), weight.to(dtype).t()) for dtype in dtypes]
    least = [float("inf")] * len(dtypes)
    for turn in range(repeats + 1):
        for i, (a, b) in enumerate(operands):
            start = time.perf_counter()
            torch.mm(a, b)
            if turn:  # the first one warms up
                least[i] = min(least[i], time.perf_counter() - start)
    return least
