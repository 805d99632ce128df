"""``fastpeft.plan``: what a training step will hold in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastpeft.errors import ConfigError
from fastpeft.planning import methods, optimizers, printing
from fastpeft.planning.building import meta_model
from fastpeft.planning.devices import DEVICES, Device
from fastpeft.planning.fitting import largest_that_fits, parse_bytes
from fastpeft.planning.planner import Planner
from fastpeft.planning.step import KINDS, PHASES, Usage
from fastpeft.targets import repeated_blocks

Quantity = Literal["batch", "sequence", "rank", "layers"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a plan is for."""

    model: str
    method: str
    rank: int | None
    layers: int | None
    batch: int
    sequence: int
    dtype: torch.dtype
    checkpointing: bool
    optimizer: str
    device: Device
    active_blocks: tuple[str, ...] | None
    parameters: int
    trainable: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one training step will hold, in bytes.

    Attributes:
        setting: what was planned.
        weights: parameters and buffers, adapters included.
        gradients: after the backward pass.
        optimizer_state: moments, masters, step counts; with what a schedule keeps aside on the device.
        activations: saved for backward, at the end of the forward pass (logits included).
        caches: what layers keep from step to step: DoRA's norms, and what they were computed from, on a CPU.
        temporaries: alive at the peak beyond the components.
        peak: the most that is alive at any moment; less than the sum where components are not all there at
            once, as gradients and activations mostly are not.
        peak_phase: ``"forward"``, ``"backward"`` or ``"optimizer"``, in which the peak is.
        peak_layer: the block or module at work then; ``""``: the loss, or none.
        peaks: the peak of each phase.
        at_peak: by component, the bytes alive at the peak; they add up to it.
        layers: by block or module, the bytes of each component.
    """

    setting: Setting
    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    caches: int
    temporaries: int
    peak: int
    peak_phase: str
    peak_layer: str
    peaks: dict[str, int]
    at_peak: dict[str, int]
    layers: dict[str, dict[str, int]]

    def __str__(self) -> str:
        return printing.text(self)


def plan(
    model_or_config: Any,
    method: Any = None,
    batch: int = 1,
    sequence: int = 1024,
    dtype: torch.dtype | str | None = None,
    *,
    checkpointing: bool = False,
    optimizer: str | optimizers.Make = "adamw",
    rank: int | None = None,
    layers: int | None = None,
    device: Device | None = None,
    attention: str | None = None,
    fits_in: int | str | None = None,
    largest: Quantity = "batch",
    exact_depth: bool = False,
) -> MemoryPlan:
    """Return what a training step will hold in memory, without allocating the model.

    The step is the one that training runs: the model's own code, :func:`fastpeft.patch`, the optimiser and
    the schedule, forward, backward and update, twice, on tensors without memory, while every storage is
    followed from birth to death (:mod:`fastpeft.planning.tracking`). For a CPU fastpeft's torch backend
    runs call for call; for a GPU its ops return and save what the Triton kernels do, and attention is flash
    attention (:mod:`fastpeft.planning.devices`). Sizes are exact sizes of storages: an allocator's rounding
    and fragmentation, the CUDA context and the workspaces of matrix products come on top.

    Models with more than five like blocks are run with four and with five, and the rest follows exactly
    (:mod:`fastpeft.planning.depth`).

    Args:
        model_or_config: a model (copied without its memory), a transformers configuration, a folder with
            ``config.json``, or that file.
        method: None (the model as it is: what requires gradients trains); a name of
            :data:`fastpeft.planning.names.NAMES`, with a number as in ``"lora:64"``, ``"prefix:20"`` and
            ``"lisa:2"``; what :func:`fastpeft.patch` takes, such as :class:`fastpeft.LoRA`; a schedule;
            or (configuration, schedule). Of a schedule's choices of blocks the most expensive one counts.
        batch: sequences a step; of a micro-batch, where gradients are accumulated.
        sequence: tokens a sequence, none of them masked.
        dtype: of the weights; default: the model's or configuration's own, else fp32. Adapters are fp32.
        checkpointing: activation checkpointing of each block, not reentrant.
        optimizer: ``"adamw"`` (torch's default way: one tensor at a time on a CPU, all at once on a GPU,
            which takes temporaries as large as what trains), ``"adamw-fused"``, ``"adamw-loop"``,
            ``"adamw-fp32-masters"``, ``"adamw-bf16-moments"``, ``"adamw-fp32-moments"``,
            ``"adamw-stochastic"``, ``"sgd"``, ``"sgd-momentum"``; as references, from packages that must be
            there, ``"galore"`` (or ``"galore:64"`` for a rank; the step that makes its projections anew) and
            ``"lomo"``, which updates within the backward pass; or a function of the model.
        rank: the adapters', instead of the method's own.
        layers: blocks that train at a time, instead of the schedule's own.
        device: ``"cpu"`` or ``"cuda"``, which differ in attention, fastpeft's backend and torch's
            optimisers; default: ``"cpu"`` for a model that is there, else ``"cuda"``.
        attention: transformers' ``attn_implementation`` for a configuration; default ``"sdpa"``.
        fits_in: bytes, or a text like ``"24GiB"``: plan the largest ``largest`` that fits.
        largest: ``"batch"``, ``"sequence"``, ``"rank"`` or ``"layers"``.
        exact_depth: run every block instead.

    Raises:
        ConfigError: an argument cannot work, or nothing fits; one line.
    """
    chosen = methods.parse(method, rank, layers)
    for name, value in (("batch", batch), ("sequence", sequence)):
        _whole(name, value)
    named = optimizers.checked(optimizer)
    target = _device(model_or_config, device)
    model = meta_model(model_or_config, _dtype(dtype), attention)

    def make(wanted: methods.Method) -> Planner:
        return Planner(model, wanted, named, target, checkpointing=checkpointing, exact_depth=exact_depth)

    def planned(planner: Planner, wanted: methods.Method, b: int, s: int) -> MemoryPlan:
        usage = planner.usage(b, s)
        active = planner.active
        blocks = None if active is None else tuple(planner.blocks[i] for i in sorted(active))
        setting = Setting(
            model=_label(model),
            method=wanted.label,
            rank=methods.rank_of(wanted),
            layers=None if active is None else len(active),
            batch=b,
            sequence=s,
            dtype=planner.dtype,
            checkpointing=checkpointing,
            optimizer=named if isinstance(named, str) else getattr(named, "__name__", "given"),
            device=target,
            active_blocks=blocks,
            parameters=planner.parameters,
            trainable=planner.trainable,
        )
        return _result(setting, usage, planner.layer)

    if fits_in is None:
        return planned(make(chosen), chosen, batch, sequence)
    limit = parse_bytes(fits_in)
    if largest not in QUANTITIES:
        raise ConfigError(f"largest: expected one of {', '.join(QUANTITIES)}, got {largest!r}")
    if largest in ("batch", "sequence"):
        planner = make(chosen)

        def at(value: int) -> MemoryPlan:
            return planned(
                planner,
                chosen,
                value if largest == "batch" else batch,
                value if largest == "sequence" else sequence,
            )
    else:

        def at(value: int) -> MemoryPlan:
            wanted = methods.parse(chosen, **{largest: value})
            return planned(make(wanted), wanted, batch, sequence)

    return largest_that_fits(at, limit, largest, _upper_bound(largest, model))


def _result(setting: Setting, usage: Usage, layer: Callable[[str], str]) -> MemoryPlan:
    region, peak = max(usage.peaks.items(), key=lambda entry: entry[1].bytes)
    totals = {kind: usage.total(kind) for kind in KINDS}
    at_peak = {kind: peak.by_kind.get(kind, 0) for kind in KINDS}
    at_peak["temporaries"] = peak.bytes - sum(at_peak.values())
    by_layer: dict[str, Counter[str]] = {}
    for kind in KINDS:
        for path, size in usage.components.get(kind, {}).items():
            by_layer.setdefault(layer(path), Counter())[kind] += size
    phases = {
        phase: max((p.bytes for r, p in usage.peaks.items() if r.phase == phase), default=0)
        for phase in PHASES
    }
    return MemoryPlan(
        setting=setting,
        **totals,
        temporaries=at_peak["temporaries"],
        peak=peak.bytes,
        peak_phase=region.phase,
        peak_layer=region.module,
        peaks=phases,
        at_peak=at_peak,
        layers={path: dict(found) for path, found in sorted(by_layer.items(), key=_in_order)},
    )


def _in_order(entry: tuple[str, Any]) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in entry[0].split("."))


def _label(model: nn.Module) -> str:
    return type(model).__name__


def _whole(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if found not in DTYPES.values():
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return found


def _device(source: Any, device: Device | None) -> Device:
    if device is None:
        parameter = next(source.parameters(), None) if isinstance(source, nn.Module) else None
        device = "cpu" if parameter is not None and parameter.is_cpu else "cuda"
    if device not in DEVICES:
        raise ConfigError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    return device


def _upper_bound(largest: Quantity, model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if largest == "sequence":
        return getattr(config, "max_position_embeddings", None)
    if largest == "layers":
        return sum(1 for _ in repeated_blocks(model))
    if largest == "rank":
        return getattr(config, "hidden_size", None)
    return None
