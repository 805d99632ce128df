"""Set-up that must come before any test module is imported, and the marker of what only Triton interprets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton decides on import whether its kernels run on a GPU or in its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.kernels import interpreter

if interpreter.ACTIVE:
    interpreter.hasten()

# Tiny tensors in two worker processes: with two threads each, they spend their time waiting for one another.
torch.set_num_threads(1)

MARKER = "interpreted: looks into Triton's interpreter, and is skipped where kernels run on a GPU"
REASON = "needs Triton's interpreter: a GPU is present, real or faked, and nothing is interpreted"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.device import FAKE_GPU, INTERPRETED

    if INTERPRETED and not FAKE_GPU:
        return
    for item in items:
        if item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(autouse=True)
def _blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have blocks too."""
    from fastpeft.blocks import worth

    monkeypatch.setattr(worth, "MIN_ELEMENTS", 0)


@pytest.fixture(autouse=True)
def _tensors_where_kernels_reach_them(request: pytest.FixtureRequest) -> Iterator[None]:
    """With FASTPEFT_TEST_FAKE_GPU=1, fail what would fail on a GPU, in tests of kernels and ops."""
    from tests.device import FAKE_GPU

    if not FAKE_GPU or Path(request.node.path).parent.name not in ("kernels", "ops"):
        yield
        return
    from tests.fake_gpu import fake_gpu

    with fake_gpu():
        yield
