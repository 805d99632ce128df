"""The ways the torch backend multiplies, each forced on every shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastpeft.ops import blocked, cpu_gemm, few_tokens


@pytest.fixture
def force_products(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that forces "native", "fp32" (in blocks of a few rows) or "few" tokens' products."""

    def force(way: str) -> None:
        monkeypatch.setattr(cpu_gemm, "fp32_is_faster", lambda dtype: way == "fp32")
        monkeypatch.setattr(cpu_gemm, "MIN_TOKENS", 0)
        monkeypatch.setattr(few_tokens, "MAX_TOKENS", 10**9 if way == "few" else -1)
        monkeypatch.setattr(blocked, "BLOCK_BYTES", 0)
        monkeypatch.setattr(blocked, "MIN_ROWS", 8)

    return force
