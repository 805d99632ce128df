"""What a GPU's roofline allows: time from bytes and FLOPs at stated rates. A model, never a measurement.

    pass = max((X + W + Y) / bandwidth, 2 M N K / rate) + (bytes of the formula - (X + W + Y)) / bandwidth

The base product runs at the slower of memory and tensor cores; what an implementation moves beyond it
(`bench.peers`) is bound by memory. Launches, occupancy and what L2 keeps are left out, so a measured time is
longer. One linear in 16 bits; forward plus backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.blocks import Shape
from bench.peers import PEERS, TARGETS, Formula
from bench.records import method_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The maker's peak rates."""

    name: str
    bandwidth: float
    """Bytes a second."""
    rate: float
    """Dense 16-bit FLOPs a second on tensor cores."""

    def __str__(self) -> str:
        return f"{self.name}: {self.bandwidth / 1e12:g} TB/s, {self.rate / 1e12:g} TFLOP/s"


GPUS = {
    "a100": Gpu(name="A100 80 GB SXM", bandwidth=2.039e12, rate=312e12),
    "h100": Gpu(name="H100 SXM", bandwidth=3.35e12, rate=989e12),
    "rtx4090": Gpu(name="RTX 4090", bandwidth=1.008e12, rate=165e12),
}
NAMES = {"peft": "PEFT", "unsloth": "Unsloth", "axolotl": "Axolotl"}
FROZEN = Formula(name="frozen", x=1, w=1, y=1)


def seconds(gpu: str | None, block: str, shape: Shape, dtype: str, names: Iterable[str]) -> dict[str, float]:
    """Modelled forward plus backward of those contenders whose formulas are known."""
    if gpu is None or block != "linear" or dtype == "float32":
        return {}
    found = {}
    for name in names:
        passes = [_formula(name, direction) for direction in ("forward", "backward")]
        known = [formula for formula in passes if formula is not None]
        if len(known) == len(passes):
            found[name] = sum(_time(GPUS[gpu], formula, shape) for formula in known)
    return found


def _formula(contender: str, direction: str) -> Formula | None:
    """What a contender moves in one pass; ours is the limit that the suite `traffic` holds the kernels to."""
    method = method_of(contender)
    if not method:
        return FROZEN if contender == "frozen" else None
    side = contender.rpartition("-")[0]
    if side in ("fastpeft", "inplace"):
        return TARGETS[method, direction]
    candidates = PEERS[method, direction]
    return next((f for f in candidates if side in NAMES and f.name.startswith(NAMES[side])), None)


def _time(gpu: Gpu, formula: Formula, shape: Shape) -> float:
    M, N, K = shape.M, shape.N, shape.K
    least = FROZEN.bytes(M, N, K)
    product = max(least / gpu.bandwidth, 2.0 * M * N * K / gpu.rate)
    return product + (formula.bytes(M, N, K) - least) / gpu.bandwidth
