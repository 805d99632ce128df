"""Tile sizes as data: one table an architecture, one row a kernel, chosen by device, dtype, rank and shape.

Every row below compiles without register spills and within the shared memory a block may use on every variant
the launchers can produce; `python -m bench codegen` checks it without a GPU. None has been timed yet: the
GEMM rows follow the accumulator that fits (128x256 fp32 over 8 warps is 128 registers a thread).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

RANK_R_GEMM = "rank_r_gemm"
RANK_R_GEMM_DROPOUT = "rank_r_gemm_dropout"
DOWN_PROJECTION = "down_projection"
GRAD_S_B = "grad_s_b"
GRAD_A = "grad_a"
KERNELS = (RANK_R_GEMM, RANK_R_GEMM_DROPOUT, DOWN_PROJECTION, GRAD_S_B, GRAD_A)

# tl.dot's smallest tile; a smaller rank is padded with masked loads.
MIN_R_TILE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """Tile sizes and launch parameters of one kernel.

    Attributes:
        block_m: rows (tokens) of a tile.
        block_n: output columns of a tile; unused by down_projection.
        block_k: step of the reduction; unused by grad_s_b and grad_a, whose reduction runs over tokens.
        block_r: largest tile of the rank; a larger rank is looped over (or tiled over programs).
        num_warps: warps (wavefronts) a program.
        num_stages: depth of the load pipeline.
        group_m: rows of tiles that run together to share L2; GEMM only.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    def r_tile(self, r: int) -> int:
        """Tile of the rank for rank `r`: a power of two from MIN_R_TILE to block_r."""
        return min(self.block_r, max(MIN_R_TILE, 1 << (r - 1).bit_length()))


Table = dict[str, tuple[KernelConfig, ...]]


def _gemm(m: int, n: int, k: int, r: int, warps: int, stages: int) -> KernelConfig:
    return KernelConfig(block_m=m, block_n=n, block_k=k, block_r=r, num_warps=warps, num_stages=stages)


def _down(m: int, k: int, r: int, warps: int, stages: int) -> KernelConfig:
    return KernelConfig(block_m=m, block_k=k, block_r=r, num_warps=warps, num_stages=stages)


def _grad(m: int, n: int, r: int, warps: int, stages: int) -> KernelConfig:
    return KernelConfig(block_m=m, block_n=n, block_r=r, num_warps=warps, num_stages=stages)


# Rows of a GEMM run from the largest tile to the smallest; rows of the others from the smallest rank tile to
# the largest.
_SM80: Table = {
    RANK_R_GEMM: (
        _gemm(128, 256, 32, 32, 8, 3),
        _gemm(128, 128, 32, 64, 8, 4),
        _gemm(64, 128, 32, 64, 4, 4),
        _gemm(64, 64, 64, 64, 4, 3),
    ),
    RANK_R_GEMM_DROPOUT: (_gemm(128, 128, 32, 64, 8, 4), _gemm(64, 64, 64, 64, 4, 3)),
    DOWN_PROJECTION: (_down(32, 128, 32, 4, 4), _down(64, 64, 64, 8, 4), _down(64, 64, 128, 8, 3)),
    GRAD_S_B: (_grad(64, 128, 16, 8, 3), _grad(32, 256, 32, 8, 3)),
    GRAD_A: (_grad(64, 128, 32, 4, 3), _grad(64, 128, 64, 8, 3), _grad(32, 128, 128, 8, 3)),
}
_SM86: Table = {
    **_SM80,
    RANK_R_GEMM: (
        _gemm(128, 128, 32, 64, 8, 2),
        _gemm(64, 128, 32, 64, 4, 3),
        _gemm(64, 64, 64, 64, 4, 3),
    ),
    RANK_R_GEMM_DROPOUT: (_gemm(128, 128, 32, 64, 8, 3), _gemm(64, 64, 64, 64, 4, 3)),
}
_SM90: Table = {
    RANK_R_GEMM: (
        _gemm(128, 256, 64, 64, 8, 3),
        _gemm(128, 128, 64, 128, 8, 3),
        _gemm(64, 128, 64, 64, 4, 4),
        _gemm(64, 64, 64, 64, 4, 4),
    ),
    RANK_R_GEMM_DROPOUT: (_gemm(128, 128, 64, 64, 8, 3), _gemm(64, 64, 64, 64, 4, 4)),
    DOWN_PROJECTION: (_down(64, 128, 32, 4, 4), _down(64, 128, 64, 4, 3), _down(64, 64, 128, 8, 3)),
    GRAD_S_B: (_grad(64, 256, 32, 8, 3),),
    GRAD_A: (_grad(64, 128, 32, 4, 3), _grad(64, 128, 64, 8, 3), _grad(64, 128, 128, 8, 3)),
}
_SM100: Table = {
    **_SM90,
    RANK_R_GEMM: (
        _gemm(128, 128, 64, 128, 8, 3),
        _gemm(64, 128, 64, 64, 4, 4),
        _gemm(64, 64, 64, 64, 4, 4),
    ),
    DOWN_PROJECTION: (_down(64, 128, 32, 4, 3), _down(64, 128, 64, 4, 3), _down(64, 32, 128, 4, 4)),
    GRAD_A: (_grad(64, 128, 32, 4, 3), _grad(64, 128, 64, 4, 3), _grad(64, 128, 128, 8, 3)),
}
# A lane mask takes two scalar registers here: more than 16 masked or dropped-out elements a thread spill
# those.
_GFX942: Table = {
    RANK_R_GEMM: (_gemm(128, 128, 64, 64, 8, 2), _gemm(64, 64, 64, 64, 4, 2)),
    RANK_R_GEMM_DROPOUT: (_gemm(128, 128, 64, 64, 8, 2), _gemm(64, 64, 64, 64, 4, 2)),
    DOWN_PROJECTION: (_down(64, 64, 16, 4, 2), _down(64, 32, 128, 8, 2)),
    GRAD_S_B: (_grad(16, 256, 16, 8, 2), _grad(32, 128, 32, 4, 2)),
    GRAD_A: (_grad(64, 64, 32, 4, 2), _grad(32, 128, 128, 8, 2)),
}
# fp32 keeps fp32's products ("ieee"): no tensor cores on NVIDIA, so tiles are those of a plain FMA loop and
# one table serves all.
_FP32: Table = {
    RANK_R_GEMM: (_gemm(64, 64, 16, 16, 8, 2),),
    RANK_R_GEMM_DROPOUT: (_gemm(64, 64, 16, 16, 8, 2),),
    DOWN_PROJECTION: (_down(32, 32, 32, 4, 2),),
    GRAD_S_B: (_grad(16, 64, 32, 4, 2),),
    GRAD_A: (_grad(16, 64, 32, 4, 2),),
}
# A wide operand whose rows do not start on 16 bytes (an odd number of columns) is read element by element,
# past the asynchronous copies, and costs registers: one table of small tiles for all, where the tables
# above spill.
_UNALIGNED: Table = {
    RANK_R_GEMM: (_gemm(64, 64, 32, 32, 4, 2),),
    RANK_R_GEMM_DROPOUT: (_gemm(64, 64, 32, 32, 8, 2),),
    DOWN_PROJECTION: (_down(32, 32, 32, 4, 2),),
    GRAD_S_B: (_grad(32, 64, 32, 4, 2),),
    GRAD_A: (_grad(32, 64, 32, 4, 2),),
}
# The interpreter runs a tile in numpy: tiles are small so that tiny test shapes still span several of them,
# several rank tiles and several groups.
_INTERPRETER: Table = {
    RANK_R_GEMM: (_gemm(32, 32, 32, 32, 4, 1), _gemm(16, 16, 16, 32, 4, 1)),
    RANK_R_GEMM_DROPOUT: (_gemm(32, 32, 32, 32, 4, 1),),
    DOWN_PROJECTION: (_down(32, 16, 32, 4, 1),),
    GRAD_S_B: (_grad(16, 32, 32, 4, 1),),
    GRAD_A: (_grad(16, 32, 32, 4, 1),),
}

TABLES: dict[str, Table] = {
    "sm_80": _SM80,
    "sm_86": _SM86,
    "sm_90": _SM90,
    "sm_100": _SM100,
    "gfx942": _GFX942,
    "fp32": _FP32,
    "unaligned": _UNALIGNED,
    "interpreter": _INTERPRETER,
}


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
