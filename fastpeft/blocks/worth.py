"""Whether a block op is worth its calls: for few tokens on a CPU single linears are faster.

A block op looks at its linears, packs what they hold and unpacks it again: calls that single linears do
not make. What it saves (shared passes over x, an activation computed again instead of kept) grows with x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.backend import get_backend

# Of x. A step of a Llama of 576 features, LoRA on all linears and one thread, took 3 to 16% less time by
# single linears up to 32 tokens, and from 64 on as long either way.
MIN_ELEMENTS = 2**16


def is_worth_it(x: Tensor) -> bool:
    """Whether linears of ``x`` [..., in_features] should be computed together."""
    # Compiled code has no calls to save, and must not depend on x's size.
    if not x.is_cpu or torch.compiler.is_compiling() or x.numel() >= MIN_ELEMENTS:
        return True
    return get_backend() == "triton"
