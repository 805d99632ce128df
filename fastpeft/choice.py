"""Which of an op's implementations runs on a GPU: timed once on the device, remembered in a file.

An op offers candidates, the default first: ``aten`` (cuBLAS and a fused expand-and-scale kernel), ``split``
(the Triton kernels), ``tma`` (the same with TMA loads), ``single`` (one kernel), ``decode`` (one kernel for a
few tokens), ``layers`` (a block's linears one by one, each as chosen for it). No model of a GPU ranks them
reliably, so :func:`choose` times them at the first call for an (op, device, shape bucket, dtype, rank
bucket); later calls find the winner in a dict.

``FASTPEFT_CHOICE``, read on import: ``auto`` measures; ``off`` takes the default; a candidate's name takes
that one wherever the op offers it. Nothing is measured off a GPU, under torch.compile or while a CUDA graph
is captured: the default runs. Candidates differ in rounding, so runs that must agree bit for bit pin one or
share the file (:mod:`fastpeft.choice_file`). Every process measures for itself: no rank waits for another.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, cast, get_args

import torch

from fastpeft.choice_file import ChoiceFile
from fastpeft.errors import ConfigError

Mode = Literal["auto", "off", "aten", "split", "single", "tma", "layers", "decode"]
Timer = Callable[[Mapping[str, Callable[[], Any]], torch.device], dict[str, float]]
ENVIRONMENT_VARIABLE = "FASTPEFT_CHOICE"
MIN_RANK = 16  # what the kernels pad a rank to
ROUNDS, RUNS = 3, 5
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class ChoiceKey(NamedTuple):
    """What a choice is made for; :func:`choice_key` makes one. M and r are the upper ends of buckets."""

    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = DTYPES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"M<={self.M} N={self.N} K={self.K} r<={self.r} {dtype}"


def choice_key(tokens: int, out_features: int, in_features: int, r: int, dtype: torch.dtype) -> ChoiceKey:
    """Return the bucket of a shape: tokens and rank rounded up to powers of two, the rest as it is."""
    return ChoiceKey(
        1 << (tokens - 1).bit_length() if tokens > 1 else 1,
        out_features,
        in_features,
        1 << (r - 1).bit_length() if r > MIN_RANK else MIN_RANK,
        dtype,
    )


def cuda_times(candidates: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Return the milliseconds of each candidate that runs; calls of it in a row, so launches count as well.

    Rounds alternate between the candidates, and the best round counts: what disturbs one disturbs no winner.
    """
    best: dict[str, float] = {}
    with torch.cuda.device(device):
        for name, run in candidates.items():
            try:
                run()  # compiles
                run()
                torch.cuda.synchronize()
            except Exception as error:
                # Out of memory, or a kernel that this device refuses: the others can still run. If none
                # can, choose() takes the default and its error is the caller's.
                _warn_once(f"fastpeft: candidate {name!r} cannot run here and is not chosen: {error}")
            else:
                best[name] = float("inf")
        for _ in range(ROUNDS):
            for name in best:
                start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                start.record()
                for _ in range(RUNS):
                    candidates[name]()
                end.record()
                end.synchronize()
                best[name] = min(best[name], start.elapsed_time(end) / RUNS)
    return best


class Chooser:
    """The choices of one process.

    Attributes:
        mode: what ``FASTPEFT_CHOICE`` said.
        timer: measures candidates on a device, in any unit.
        file: keeps measured times between processes, or None.
    """

    def __init__(self, mode: Mode, timer: Timer = cuda_times, file: ChoiceFile | None = None) -> None:
        self.mode = mode
        self.timer = timer
        self.file = file
        self._winners: dict[tuple[Any, ...], str] = {}
        self._times: dict[tuple[str, ChoiceKey], dict[str, float]] = {}
        # Forward and backward run in different threads; a candidate may itself choose.
        self._lock = threading.RLock()

    def choose(
        self, op: str, candidates: Mapping[str, Callable[[], Any]], *, key: ChoiceKey, device: torch.device
    ) -> str:
        """See :func:`choose`."""
        winner = self._winners.get((op, key, device, *candidates))
        if winner is not None and not torch.compiler.is_compiling():
            return winner
        return self._decide(op, candidates, key, device)

    def made(self) -> Iterator[str]:
        """Yield a line for every measured choice: the winner, and every candidate's time relative to it."""
        for (op, key), times in sorted(self._times.items(), key=lambda item: (item[0][0], item[0][1][:4])):
            ranked = sorted(times, key=times.__getitem__)
            first, *rest = (f"{times[name] / times[ranked[0]]:.2f}" for name in ranked)
            others = "".join(f", {name} {ratio}" for name, ratio in zip(ranked[1:], rest, strict=True))
            yield f"{op} {key}: {ranked[0]} ({first}){others}"

    def _decide(
        self, op: str, candidates: Mapping[str, Callable[[], Any]], key: ChoiceKey, device: torch.device
    ) -> str:
        default = self.mode if self.mode in candidates else next(iter(candidates))
        if torch.compiler.is_compiling():
            return default
        place = (op, key, device, *candidates)
        if self.mode != "auto" or len(candidates) == 1 or not can_measure(device):
            self._winners[place] = default
            return default
        if is_capturing():
            return default
        with self._lock:
            if place not in self._winners:
                times = self._known_times(op, candidates, key, device)
                self._winners[place] = min(times, key=times.__getitem__) if times else default
                if times:
                    self._times[op, key] = times
        return self._winners[place]

    def _known_times(
        self, op: str, candidates: Mapping[str, Callable[[], Any]], key: ChoiceKey, device: torch.device
    ) -> dict[str, float]:
        """Return every candidate's time, from the file if it has them all."""
        entry = f"{op} | {device_name(device)} | {key}"
        kept = {} if self.file is None else self.file.read().get(entry, {})
        if candidates.keys() <= kept.keys():
            return {name: kept[name] for name in candidates}
        times = self.timer(candidates, device)
        if self.file is not None and times.keys() == candidates.keys():
            self.file.add(entry, times)
        return times


def choose(
    op: str, candidates: Mapping[str, Callable[[], Any]], *, key: ChoiceKey, device: torch.device
) -> str:
    """Return the name of the candidate to run.

    Args:
        op: the op's name.
        candidates: what may run, by name, the default first. Called only where they are timed, several times
            each, so they must change nothing but what they return.
        key: :func:`choice_key` of the call.
        device: where the tensors are.
    """
    return CHOOSER.choose(op, candidates, key=key, device=device)


def choices() -> tuple[str, ...]:
    """Return a line for every choice measured or found in the file so far."""
    return tuple(CHOOSER.made())


def can_measure(device: torch.device) -> bool:
    """Whether times mean something: on a GPU (ROCm's is called cuda as well) with compiled kernels."""
    return device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1"


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def device_name(device: torch.device) -> str:
    """Return the device's name as its driver gives it."""
    return torch.cuda.get_device_name(device)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def validated_mode(name: str) -> Mode:
    """Return ``name`` if it is a mode.

    Raises:
        ConfigError: it is none.
    """
    if name not in get_args(Mode):
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}: expected one of {', '.join(get_args(Mode))}, got {name!r}"
        )
    return cast(Mode, name)


CHOOSER = Chooser(validated_mode(os.environ.get(ENVIRONMENT_VARIABLE, "auto")), file=ChoiceFile())
