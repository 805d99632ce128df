"""Which of the torch backend's ways multiplies: they differ in speed alone."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from fastpeft.ops import blocked, few_tokens, native
from fastpeft.ops.cpu_gemm import products_in_fp32


def way_for(tokens: Tensor) -> ModuleType:
    """Return the module whose ``forward`` and ``backward`` serve ``tokens`` [tokens, features]."""
    if tokens.element_size() != 2:
        return native
    if few_tokens.serves(tokens):
        return few_tokens
    return blocked if products_in_fp32(tokens) else native
