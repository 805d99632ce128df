"""The GPU families the kernels are compiled for, and what each lets a block have."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
TENSOR_MEMORY_COLUMNS = 512  # sm_100's tensor memory, per streaming multiprocessor


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A GPU to compile for.

    Attributes:
        backend: Triton's, like arch and warp_size.
        arch: name of the architecture.
        warp_size: lanes a warp (wavefront).
        shared_limit: bytes of shared memory one block may use.
        main_core: prefix of the tensor-core instruction a GEMM must use, where there is a choice.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    main_core: str = ""


TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, warp_size=32, shared_limit=163 * KIB),
    "sm_86": Target(backend="cuda", arch=86, warp_size=32, shared_limit=99 * KIB),
    "sm_89": Target(backend="cuda", arch=89, warp_size=32, shared_limit=99 * KIB),
    "sm_90": Target(backend="cuda", arch=90, warp_size=32, shared_limit=227 * KIB, main_core="HGMMA"),
    "sm_100": Target(backend="cuda", arch=100, warp_size=32, shared_limit=227 * KIB, main_core="UTC"),
    "sm_120": Target(backend="cuda", arch=120, warp_size=32, shared_limit=99 * KIB),
    "gfx942": Target(backend="hip", arch="gfx942", warp_size=64, shared_limit=64 * KIB),
    "gfx1100": Target(backend="hip", arch="gfx1100", warp_size=32, shared_limit=64 * KIB),
}
