"""What a family of kernels tells the code-generation check about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .targets import TARGETS


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One `triton.jit` function that a launcher launches, and what its machine code must have.

    Attributes:
        module: file of `fastpeft_kernels` that holds it; with dots below a folder.
        function: its name in that file, ending in `_kernel`.
        tensor_cores: whether 16-bit launches must have tensor-core instructions.
        gemm: whether those must be wgmma on sm_90 and tcgen05 on sm_100: the products with a wide output,
            whose FLOPs are the layer's.
        streams: whether the main loop of aligned 16-bit launches must read at least half of its bytes by
            16-byte loads.
        reads_tile: whether the stream is a tile of BLOCK_M x BLOCK_N instead, read outside the main loop:
            aligned 16-bit launches must have 16-byte loads enough for it there.
        each_rank_tile: whether aligned 16-bit launches are compiled at every tile of the rank they take;
            elsewhere a wider tile stands for a narrower one.
    """

    module: str
    function: str
    tensor_cores: bool = True
    gemm: bool = False
    streams: bool = True
    reads_tile: bool = False
    each_rank_tile: bool = False

    @property
    def name(self) -> str:
        """Short name, as on the command line and in the tables."""
        return self.function.removesuffix("_kernel")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call of a launcher on meta tensors.

    Attributes:
        run: makes the call.
        note: what is special about it, for the table ("fwd bf16 r16 drop").
        dtype: of the wide operands; fp32 is exempt from tensor cores and 16-byte loads.
        aligned: whether rows of the wide operands start on 16 bytes; if not, so are those.
        default: whether `--quick` (what CI compiles) has it.
    """

    run: Callable[[], object]
    note: str
    dtype: torch.dtype
    aligned: bool = True
    default: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Kernels that belong together and the cases that reach all their variants and rows.

    Attributes:
        name: short name, as on the command line.
        kernels: the kernels whose home this family is. It may launch those of other families too.
        keys: keys of the configuration tables of which its cases must reach every row.
        cases: makes the cases, given the name of the target. Launchers are only called inside `Case.run`.
        targets: where the kernels are used.
    """

    name: str
    kernels: tuple[Kernel, ...]
    keys: tuple[str, ...]
    cases: Callable[[str], Iterator[Case]]
    targets: tuple[str, ...] = tuple(TARGETS)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory, enough for a launcher whose kernels are recorded."""
    return torch.empty(shape, dtype=dtype, device="meta")
