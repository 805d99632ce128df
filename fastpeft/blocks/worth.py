"""Whether a block op is worth its calls: for few tokens on a CPU single linears are faster.

A block op looks at its linears, packs what they hold and unpacks it again: calls that single linears do
not make. What it saves (shared passes over x, an activation computed again instead of kept) grows with x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import backend as backends

# Of x. A Llama's layers of 576 features with LoRA on all linears, one thread: up to 32 tokens a step took 1 to
# 13% less time by single linears, from 64 on as long either way.
MIN_ELEMENTS = 2**16


def is_worth_it(x: Tensor) -> bool:
    """Whether linears of ``x`` [..., in_features] should be computed together."""
    if not x.is_cpu or x.numel() >= MIN_ELEMENTS or torch.compiler.is_compiling():
        return True  # compiled code has no calls to save
    return backends.resolve(x, op="blocks") != "torch"
