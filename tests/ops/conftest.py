"""The ways the torch backend multiplies, each forced on every shape; and memory that nobody wrote is NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fastpeft import choice
from fastpeft.ops import blocked, cpu_gemm, few_tokens


@pytest.fixture
def force_products(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that forces "native", "fp32" (in blocks of a few rows) or "few" tokens' products."""

    def force(way: str) -> None:
        monkeypatch.setattr(cpu_gemm, "fp32_from", lambda dtype, backward: 0 if way == "fp32" else 2**62)
        monkeypatch.setattr(few_tokens, "MAX_TOKENS", 10**9 if way == "few" else -1)
        monkeypatch.setattr(blocked, "BLOCK_BYTES", 0)
        monkeypatch.setattr(blocked, "MIN_ROWS", 8)

    return force


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin give with NaN, integers with their largest number.

    The kernels' launchers have guards of their own (tests/kernels/memory.py); this is the torch backend's.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, too, the default path runs unless a test says otherwise, and no file of times is written."""
    monkeypatch.setattr(choice, "CHOOSER", choice.Chooser("off"))
