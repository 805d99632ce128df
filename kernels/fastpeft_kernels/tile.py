"""What a row of the configuration tables is: tile sizes and launch parameters of one kernel."""

from __future__ import annotations

from dataclasses import dataclass

# tl.dot's smallest tile; a smaller rank is padded with masked loads.
MIN_R_TILE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """Tile sizes and launch parameters of one kernel.

    Attributes:
        block_m: rows (tokens; of W in row_norm) of a tile.
        block_n: output columns of a tile; unused by down_projection.
        block_k: step of the reduction; unused by grad_s_b and grad_a, whose reduction runs over tokens.
        block_r: largest tile of the rank; a larger rank is looped over (or tiled over programs).
        num_warps: warps (wavefronts) a program.
        num_stages: depth of the load pipeline.
        group_m: rows of tiles that run together to share L2; GEMM only.
        warp_specialize: whether loads and products get warps of their own; rank_r_gemm_tma only.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    block_r: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    warp_specialize: bool = False

    def r_tile(self, r: int) -> int:
        """Tile of the rank for rank `r`: a power of two from MIN_R_TILE to block_r."""
        return min(self.block_r, max(MIN_R_TILE, 1 << (r - 1).bit_length()))


Table = dict[str, tuple[KernelConfig, ...]]


def gemm(m: int, n: int, k: int, r: int, warps: int, stages: int) -> KernelConfig:
    """Tile of a GEMM: BLOCK_M, BLOCK_N, BLOCK_K, largest BLOCK_R, warps, stages."""
    return KernelConfig(block_m=m, block_n=n, block_k=k, block_r=r, num_warps=warps, num_stages=stages)


def down(m: int, k: int, r: int, warps: int, stages: int) -> KernelConfig:
    """Tile of a product with few columns: BLOCK_M, BLOCK_K, largest BLOCK_R, warps, stages."""
    return KernelConfig(block_m=m, block_k=k, block_r=r, num_warps=warps, num_stages=stages)


def grad(m: int, n: int, r: int, warps: int, stages: int) -> KernelConfig:
    """Tile of a sum over tokens: BLOCK_M, BLOCK_N, largest BLOCK_R, warps, stages."""
    return KernelConfig(block_m=m, block_n=n, block_r=r, num_warps=warps, num_stages=stages)
