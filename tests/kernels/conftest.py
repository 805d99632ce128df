"""Kernel tests run on a GPU when there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.device import DEVICE
from tests.kernels import interpreter


@pytest.fixture(autouse=True)
def mended_interpreter() -> Iterator[None]:
    with interpreter.mended():
        yield


@pytest.fixture
def device() -> torch.device:
    return DEVICE
