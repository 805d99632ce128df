"""Which implementation of an op runs: ``torch`` (ATen calls) or ``triton`` (the fused kernels).

``auto`` takes ``triton`` for tensors on a GPU that the kernels have a configuration for, and ``torch``
everywhere else. An explicit choice never falls back: if it cannot run, it raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, cast

import torch

from fastpeft.errors import BackendError, ConfigError

Backend = Literal["auto", "torch", "triton"]
ResolvedBackend = Literal["torch", "triton"]
BACKENDS: tuple[str, ...] = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "FASTPEFT_BACKEND"
TRITON_IS_IMPORTABLE = find_spec("triton") is not None and find_spec("fastpeft_kernels") is not None


def _validated(name: str, where: str) -> Backend:
    if name not in BACKENDS:
        raise ConfigError(f"{where}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return cast(Backend, name)


_selected: Backend = _validated(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def get_backend() -> Backend:
    """Return the process-wide choice (initially the environment's ``FASTPEFT_BACKEND``, else ``auto``)."""
    return _selected


def set_backend(name: Backend) -> None:
    """Choose the backend of every op in this process.

    Raises:
        ConfigError: ``name`` is not ``auto``, ``torch`` or ``triton``.
    """
    global _selected
    _selected = _validated(name, "set_backend")


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Choose the backend inside a ``with`` block; the backward of what ran inside keeps that choice."""
    previous = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


@cache
def _has_configuration(device: torch.device) -> bool:
    """Whether the kernels support a GPU: every AMD part, and NVIDIA's from sm_80 on (bf16 tensor cores)."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve(x: torch.Tensor, *, op: str, has_triton: bool = True) -> ResolvedBackend:
    """Return the backend that runs ``op`` on ``x``.

    Raises:
        BackendError: ``triton`` was asked for and the op has no kernel, triton is not installed, or ``x`` is
            on a device that neither a compiled kernel nor the interpreter can reach.
    """
    if _selected == "torch":
        return "torch"
    on_gpu = x.is_cuda  # True on ROCm as well
    if _selected == "auto":
        runs = has_triton and TRITON_IS_IMPORTABLE and x.dtype is not torch.float64
        return "triton" if runs and on_gpu and _has_configuration(x.device) else "torch"
    if not has_triton:
        raise BackendError(f"{op}: no Triton kernel yet; expected backend 'auto' or 'torch', got 'triton'")
    if not TRITON_IS_IMPORTABLE:
        raise BackendError(f"{op}: backend 'triton' needs triton (pip install 'fastpeft[triton]')")
    if x.dtype is torch.float64:
        raise BackendError(f"{op}: the Triton kernels take float32, float16 and bfloat16, got {x.dtype}")
    if not on_gpu and not _interpreting():
        raise BackendError(
            f"{op}: backend 'triton' needs a GPU tensor, got one on {x.device} "
            "(set TRITON_INTERPRET=1 before Python starts to run the kernels interpreted)"
        )
    if on_gpu and not _has_configuration(x.device):
        raise BackendError(f"{op}: the Triton kernels need compute capability 8.0, {x.device} is older")
    return "triton"
