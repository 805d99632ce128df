"""Triton kernels of fastpeft: torch tensors in, torch tensors out; no autograd, no modules.

Importing this package never imports Triton, so that a machine without it can still import `fastpeft`; the
launchers below are imported with their module on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from .projection import Projection
from .when import MAX_DECODE_TOKENS, MAX_RANK, prefers_single

if TYPE_CHECKING:
    from .bottleneck import bottleneck_up, bottleneck_up_backward
    from .checked_norm import kept_norm
    from .decode import dora_decode, lora_decode
    from .dora import dora_backward, dora_forward
    from .expand import dora_forward_expand, expand_add, expand_add_, expand_scale_, lora_forward_expand
    from .factored_norm import row_norm
    from .gemm import serves_tma
    from .glu import glu_backward, glu_forward
    from .lora import lora_backward, lora_forward
    from .lora_add import lora_add_, lora_add_backward
    from .single import dora_forward_single, lora_forward_single
    from .stacked import stacked_backward, stacked_forward

__all__ = [
    "MAX_DECODE_TOKENS",
    "MAX_RANK",
    "Projection",
    "bottleneck_up",
    "bottleneck_up_backward",
    "dora_backward",
    "dora_decode",
    "dora_forward",
    "dora_forward_expand",
    "dora_forward_single",
    "expand_add",
    "expand_add_",
    "expand_scale_",
    "glu_backward",
    "glu_forward",
    "is_available",
    "kept_norm",
    "lora_add_",
    "lora_add_backward",
    "lora_backward",
    "lora_decode",
    "lora_forward",
    "lora_forward_expand",
    "lora_forward_single",
    "prefers_single",
    "row_norm",
    "serves_tma",
    "stacked_backward",
    "stacked_forward",
]

_MODULES = {
    "bottleneck_up": "bottleneck",
    "bottleneck_up_backward": "bottleneck",
    "dora_backward": "dora",
    "dora_decode": "decode",
    "dora_forward": "dora",
    "dora_forward_expand": "expand",
    "dora_forward_single": "single",
    "expand_add": "expand",
    "expand_add_": "expand",
    "expand_scale_": "expand",
    "glu_backward": "glu",
    "glu_forward": "glu",
    "kept_norm": "checked_norm",
    "lora_add_": "lora_add",
    "lora_add_backward": "lora_add",
    "lora_backward": "lora",
    "lora_decode": "decode",
    "lora_forward": "lora",
    "lora_forward_expand": "expand",
    "lora_forward_single": "single",
    "row_norm": "factored_norm",
    "serves_tma": "gemm",
    "stacked_backward": "stacked",
    "stacked_forward": "stacked",
}


def is_available() -> bool:
    """Whether Triton can be imported; says nothing about a GPU being present."""
    return importlib.util.find_spec("triton") is not None


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not is_available():
        raise ImportError(
            "the triton kernels need Triton, which is not installed: pip install fastpeft[triton]"
        )
    launcher: object = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = launcher
    return launcher
