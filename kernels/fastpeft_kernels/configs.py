"""Which row of the tables a launch takes: by device, dtype, layout, rank and shape."""

from __future__ import annotations

from functools import lru_cache

import torch

from .kernel_names import (
    DOWN_PROJECTION,
    GRAD_A,
    GRAD_S_B,
    KERNELS,
    RANK_R_GEMM,
    RANK_R_GEMM_DROPOUT,
)
from .tables import TABLES
from .tile import KernelConfig

__all__ = [
    "DOWN_PROJECTION",
    "GRAD_A",
    "GRAD_S_B",
    "KERNELS",
    "RANK_R_GEMM",
    "RANK_R_GEMM_DROPOUT",
    "TABLES",
    "KernelConfig",
]


@lru_cache
def architecture(device: torch.device) -> str:
    """Name of the 16-bit table for `device`; RuntimeError where the kernels cannot run."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"  # 64 KiB of LDS on all of AMD's parts; the rows are checked on gfx942 only
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"the triton kernels need compute capability 8.0 or newer, {device} has {major}.{minor}"
        )
    exact = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    # sm_86, sm_89 and sm_120 offer a block 99 KiB of shared memory; an unknown part is treated as one of
    # them.
    return exact.get((major, minor), "sm_86")


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row (or column) starts on 16 bytes, as Triton's JIT sees it when it specialises."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(stride == 1 or stride % 16 == 0 for stride in tensor.stride())
        for tensor in tensors
    )


def rows(kernel: str, *wide: torch.Tensor) -> tuple[KernelConfig, ...]:
    """The rows for `kernel` on the device and for the dtype and layout of its wide operands."""
    table = architecture(wide[0].device)
    if table != "interpreter":
        if wide[0].dtype == torch.float32:
            table = "fp32"
        elif not is_aligned(*wide):
            table = "unaligned"
    return TABLES[table][kernel]


def select(kernel: str, wide: torch.Tensor, r: int) -> KernelConfig:
    """The first row whose rank tile covers `r`, else the one with the largest rank tile."""
    candidates = rows(kernel, wide)
    return next((row for row in candidates if row.block_r >= r), candidates[-1])


def select_gemm(kernel: str, p: torch.Tensor, q: torch.Tensor, units: int) -> KernelConfig:
    """The largest tile of which `p [M, K] q [K, N]` has one for each of `units`, else the smallest."""
    candidates = rows(kernel, p, q)
    for row in candidates:
        if -(-p.shape[0] // row.block_m) * -(-q.shape[1] // row.block_n) >= units:
            return row
    return candidates[-1]
