"""The methods that can be named in a text, a line each: ``lora``, ``lora-fa:16``, ``prefix:20``, ``lisa``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastpeft.config import LoRA
from fastpeft.errors import ConfigError
from fastpeft.methods.adalora import AdaLoRA
from fastpeft.methods.bitfit import BitFit
from fastpeft.methods.bottleneck import ParallelAdapter, SeriesAdapter
from fastpeft.methods.intrinsic import IntrinsicDimension
from fastpeft.methods.ln_lora import LNLoRA
from fastpeft.methods.prompts import PrefixTuning, PromptTuning
from fastpeft.methods.vera import VeRA
from fastpeft.sparse.ist import IST
from fastpeft.sparse.schedule import LISA, BAdam, TopK


@dataclass(frozen=True)
class Name:
    """What a name stands for.

    Attributes:
        make: makes the configuration or the schedule; None: every parameter trains.
        number: its field that the number after the colon is; None: it takes no number.
        shown: the field, in front of its value, in a label.
    """

    make: Callable[..., Any] | None = None
    number: str | None = None
    shown: str = ""


def _adalora(init_r: int = 12) -> AdaLoRA:
    """AdaLoRA as it begins; ranks that follow from training are nothing to plan by."""
    return AdaLoRA(init_r=init_r, target_r=min(8, init_r), total_step=1)


NAMES: dict[str, Name] = {
    "full": Name(),
    "lora": Name(LoRA, "r", "r="),
    "dora": Name(partial(LoRA, use_dora=True), "r", "r="),
    "lora-fa": Name(partial(LoRA, freeze_lora_A=True), "r", "r="),
    "ln-lora": Name(LNLoRA, "r", "r="),
    "adalora": Name(_adalora, "init_r", "init_r="),
    "vera": Name(VeRA, "r", "r="),
    "bitfit": Name(BitFit),
    "series": Name(SeriesAdapter, "bottleneck_size", "size "),
    "parallel": Name(ParallelAdapter, "bottleneck_size", "size "),
    "prefix": Name(partial(PrefixTuning, num_virtual_tokens=20), "num_virtual_tokens", "tokens "),
    "prompt": Name(partial(PromptTuning, num_virtual_tokens=20), "num_virtual_tokens", "tokens "),
    "intrinsic": Name(partial(IntrinsicDimension, d=1000), "d", "d="),
    "lisa": Name(LISA, "layers"),
    "badam": Name(BAdam),
    "topk": Name(TopK, "layers"),
    "ist": Name(IST, "layers"),
}


def named(text: str) -> Any:
    """Return the configuration or schedule that a name stands for; None for ``"full"``.

    Raises:
        ConfigError: there is no such name, it takes no number, or the number cannot work.
    """
    match = re.fullmatch(r"([a-z+-]+)(?::(\d+))?", text.strip().lower())
    entry = NAMES.get(match[1]) if match else None
    if match is None or entry is None or (match[2] is not None and entry.number is None):
        raise ConfigError(
            f"method: expected one of {', '.join(NAMES)}, with a number where it has one "
            f"(lora:64, prefix:20, lisa:2), got {text!r}"
        )
    if entry.make is None:
        return None
    return entry.make() if match[2] is None else entry.make(**{str(entry.number): int(match[2])})


def label(config: Any) -> str:
    """Return a configuration's name and size, for people."""
    kind = type(config).__name__
    if isinstance(config, LoRA):
        kind = "DoRA" if config.use_dora else "LoRA-FA" if config.freeze_lora_A else "LoRA"
    sizes = {entry.number: entry.shown for entry in NAMES.values() if entry.number and entry.shown}
    parts = [f"{shown}{getattr(config, field)}" for field, shown in sizes.items() if hasattr(config, field)]
    return " ".join([kind, *parts])
