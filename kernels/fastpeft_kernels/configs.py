"""Which row of the tables a launch takes: by device, dtype, layout, rank and shape."""

from __future__ import annotations

from functools import lru_cache

import torch

from .kernel_names import (
    DECODE,
    DOWN_PROJECTION,
    EXPAND,
    GLU_BACKWARD,
    GLU_BACKWARD_DROPOUT,
    GLU_GEMM,
    GRAD_A,
    GRAD_S_B,
    GRAD_S_B_DORA,
    KERNELS,
    RANK_R_GEMM,
    RANK_R_GEMM_DORA,
    RANK_R_GEMM_DORA_BACKWARD,
    RANK_R_GEMM_DORA_DROPOUT,
    RANK_R_GEMM_DORA_DROPOUT_BACKWARD,
    RANK_R_GEMM_DORA_Z,
    RANK_R_GEMM_DROPOUT,
    RANK_R_GEMM_TMA,
    ROW_NORM,
    SINGLE,
    SINGLE_NORM,
    STACKED_DOWN,
    STACKED_DX,
    STACKED_DX_DROPOUT,
    STACKED_GEMM,
    STACKED_GRAD,
)
from .tables import TABLES
from .tile import KernelConfig

__all__ = [
    "DECODE",
    "DOWN_PROJECTION",
    "EXPAND",
    "GLU_BACKWARD",
    "GLU_BACKWARD_DROPOUT",
    "GLU_GEMM",
    "GRAD_A",
    "GRAD_S_B",
    "GRAD_S_B_DORA",
    "KERNELS",
    "RANK_R_GEMM",
    "RANK_R_GEMM_DORA",
    "RANK_R_GEMM_DORA_BACKWARD",
    "RANK_R_GEMM_DORA_DROPOUT",
    "RANK_R_GEMM_DORA_DROPOUT_BACKWARD",
    "RANK_R_GEMM_DORA_Z",
    "RANK_R_GEMM_DROPOUT",
    "RANK_R_GEMM_TMA",
    "ROW_NORM",
    "SINGLE",
    "SINGLE_NORM",
    "STACKED_DOWN",
    "STACKED_DX",
    "STACKED_DX_DROPOUT",
    "STACKED_GEMM",
    "STACKED_GRAD",
    "TABLES",
    "KernelConfig",
]


@lru_cache
def architecture(device: torch.device) -> str:
    """Name of the 16-bit table for `device`; RuntimeError where the kernels cannot run."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        # gfx9 (Instinct) runs 64 lanes a wavefront and has MFMA; gfx11 and gfx12 (Radeon) run 32 and have
        # WMMA. All have 64 KiB of LDS.
        name = torch.cuda.get_device_properties(device).gcnArchName
        return "gfx942" if name.startswith("gfx9") else "gfx1100"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"the triton kernels need compute capability 8.0 or newer, {device} has {major}.{minor}"
        )
    if major == 12:
        return "sm_120"
    exact = {(8, 0): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    # An unknown part gets the rows that ask for least: mma.sync and 99 KiB of shared memory a block.
    return exact.get((major, minor), "sm_86")


def all_registers(device: torch.device) -> dict[str, int]:
    """Launch options that let a thread have all 255 registers; none on AMD, which has no such option.

    Unasked, ptxas aims at a second block a multiprocessor and spills for it: grad_s_b at 32x256 and r = 16 on
    sm_86 got 128 registers and 208 bytes of spills, where 162 registers hold everything.
    """
    return {"maxnreg": 255} if architecture(device).startswith("sm_") else {}


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


def select_row_norm(weight: torch.Tensor, r: int, units: int) -> KernelConfig:
    """Of the rows with the first rank tile that covers `r`, the most rows of W that still keep `units` busy.

    Three programs for four units count as busy: 4096 rows by 32 are 128 programs for 132 multiprocessors.
    """
    candidates = rows(ROW_NORM, weight)
    tile = next((row.block_r for row in candidates if row.block_r >= r), candidates[-1].block_r)
    fitting = [row for row in candidates if row.block_r == tile]
    busy = (row for row in fitting if -(-weight.shape[0] // row.block_m) * 4 >= units * 3)
    return next(busy, fitting[-1])


def select_gemm(kernel: str, p: torch.Tensor, q: torch.Tensor, units: int) -> KernelConfig:
    """The largest tile of which `p [M, K] q [K, N]` has one for each of `units`, else the smallest."""
    candidates = rows(kernel, p, q)
    for row in candidates:
        if -(-p.shape[0] // row.block_m) * -(-q.shape[1] // row.block_n) >= units:
            return row
    return candidates[-1]
