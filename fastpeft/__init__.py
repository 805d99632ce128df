"""Fused LoRA and DoRA fine-tuning for transformer models, inside the training loop you already have.

>>> fastpeft.patch(model, fastpeft.LoRA(r=16))     # adapters on, base frozen, in place
>>> fastpeft.save(model, folder)                   # PEFT's own file format
>>> fastpeft.load(fresh_model, folder)
>>> fastpeft.unpatch(model)                        # the model as it was, bitwise
"""

from fastpeft._version import __version__
from fastpeft.backend import get_backend, set_backend, use_backend
from fastpeft.checkpoint import load, save
from fastpeft.config import LoRA
from fastpeft.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    FastPeftError,
    PatchError,
    ShapeError,
)
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.lora import lora_linear
from fastpeft.patch_report import PatchReport
from fastpeft.patching import patch, report, unpatch

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "FastPeftError",
    "LoRA",
    "PatchError",
    "PatchReport",
    "ShapeError",
    "__version__",
    "dora_linear",
    "get_backend",
    "load",
    "lora_linear",
    "patch",
    "report",
    "save",
    "set_backend",
    "unpatch",
    "use_backend",
]
