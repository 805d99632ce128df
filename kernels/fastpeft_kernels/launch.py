"""What every launcher shares: allocation, how far to split a reduction, the right device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

# Multiply-add contraction is stated for every launch: Triton 3.9 contracts by default and says that 3.10 will
# not, and rounding must not move with the version.
FP_FUSION = True

# Partial results of a split reduction keep the accumulator's precision.
PARTIAL_DTYPE = torch.float32

# Units of work the interpreter pretends to have: small, and enough that split reductions are exercised.
INTERPRETER_UNITS = 4


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Contiguous uninitialised memory on `like`'s device; every buffer a kernel writes comes from here."""
    return torch.empty(shape, dtype=dtype, device=like.device)


# Counters of unfinished splits, one buffer a device and stream: launches on one stream follow each other, and
# every kernel leaves its counters at zero. Not for launches that a CUDA graph records: zeroing a new buffer
# would be recorded too, and not be done for an eager launch, or for another graph that is replayed first; and
# graphs of one capture stream may run side by side. Those have zeros of their own, written at each replay, in
# the graph's own memory. Nor for streams whose memory comes from a pool that somebody else counts, as in the
# warm-up of torch.compile's CUDA graphs, where a tensor that stays is an error.
_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
_PRIVATE: set[tuple[torch.device, int]] = set()


def counters(count: int, like: Tensor) -> Tensor:
    """At least `count` int32 zeros on `like`'s device, for `finish.is_last`, which puts them back to zero."""
    if like.device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=like.device)
    if _is_recorded(like):
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.device.type == "cuda" else 0
    key = (like.device, stream)
    kept = _COUNTERS.get(key)
    if kept is not None and kept.numel() >= count:
        return kept
    made = torch.zeros(max(count, 1024), dtype=torch.int32, device=like.device)
    if key not in _PRIVATE and _is_in_private_pool(made):
        _PRIVATE.add(key)  # for good: it is asked once, for a snapshot of all memory takes milliseconds
    if key not in _PRIVATE:
        _COUNTERS[key] = made
    return made


def _is_in_private_pool(tensor: Tensor) -> bool:
    """Whether a tensor's memory is, or may be, of another pool than the allocator's own."""
    if tensor.device.type != "cuda":
        return False
    address = tensor.untyped_storage().data_ptr()
    try:
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    except RuntimeError:  # cudaMallocAsync and pluggable allocators have none
        return True
    for segment in segments:
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return tuple(segment.get("segment_pool_id", ())) not in ((), (0, 0))
    return False


def _is_recorded(like: Tensor) -> bool:
    if like.device.type != "cuda":
        return False
    with on_device(like):
        return torch.cuda.is_current_stream_capturing()


@lru_cache
def _unit_count(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def unit_count(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of `device`."""
    return _unit_count(device) if device.type == "cuda" else INTERPRETER_UNITS


def cdiv(numerator: int, denominator: int) -> int:
    """Quotient rounded up."""
    return -(-numerator // denominator)


def split_reduction(programs: int, tiles: int, units: int, min_tiles: int = 4) -> tuple[int, int]:
    """Cut a reduction over `tiles` into `(splits, tiles_per_split)` so that all `units` have work.

    The cut depends on shapes and device only, so two runs add in the same order. A split keeps at least
    `min_tiles` tiles, because each one costs a write and a read of an fp32 partial result.
    """
    splits = max(1, min(units // max(programs, 1), tiles // min_tiles))
    per_split = cdiv(tiles, splits)
    return cdiv(tiles, per_split), per_split


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make `tensor`'s device the current one."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
