"""The methods there are, by configuration and by their name in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpeft import fields
from fastpeft.config import LoRA
from fastpeft.errors import ConfigError
from fastpeft.methods.adalora import AdaLoRAMethod
from fastpeft.methods.bitfit import BitFitMethod
from fastpeft.methods.bottleneck import BottleneckMethod, ParallelAdapter, SeriesAdapter
from fastpeft.methods.intrinsic import IntrinsicDimensionMethod
from fastpeft.methods.ln_lora import LNLoRAMethod
from fastpeft.methods.lora import LoRAMethod
from fastpeft.methods.method import Method
from fastpeft.methods.prompts import PrefixTuning, PromptMethod, PromptTuning
from fastpeft.methods.vera import VeRAMethod

METHODS: tuple[Method, ...] = (
    LoRAMethod(),
    VeRAMethod(),
    LNLoRAMethod(),
    AdaLoRAMethod(),
    BitFitMethod(),
    BottleneckMethod(SeriesAdapter),
    BottleneckMethod(ParallelAdapter),
    PromptMethod(PrefixTuning),
    PromptMethod(PromptTuning),
    IntrinsicDimensionMethod(),
)


def method_of(config: Any) -> Method:
    """Return the method of one of our configurations."""
    return next(method for method in METHODS if isinstance(config, method.config))


def is_ours(config: Any) -> bool:
    """Whether it is one of our configurations."""
    return any(isinstance(config, method.config) for method in METHODS)


def as_config(config: Any) -> Any:
    """Return one of our configurations: None gives the default LoRA, one of PEFT's objects is translated.

    Raises:
        ConfigError: it is something else, or asks for what is not honoured.
    """
    if config is None:
        return LoRA()
    if is_ours(config):
        return config
    if hasattr(config, "peft_type") and hasattr(config, "to_dict"):
        kind, _ = fields.read_peft(config)
        return _by_type(kind).translate(config)
    raise ConfigError(
        f"config: expected {_ours()} or one of PEFT's configurations, got {type(config).__name__}"
    )


def read_content(content: Mapping[str, Any]) -> tuple[Method, Any]:
    """Return the method and the configuration that ``adapter_config.json`` describes.

    Raises:
        ConfigError: it asks for what is not honoured.
    """
    kind, _ = fields.read_peft(content)
    method = _by_type(kind)
    return method, method.read(content)


def _by_type(kind: str) -> Method:
    for method in METHODS:
        if method.peft_type == kind:
            return method
    known = ", ".join(method.peft_type for method in METHODS)
    raise ConfigError(f"expected a peft_type of {known}, got peft_type {kind!r}")


def _ours() -> str:
    return ", ".join(f"fastpeft.{method.config.__name__}" for method in METHODS)
