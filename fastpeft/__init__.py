"""Fused LoRA and DoRA fine-tuning for transformer models, inside the training loop you already have.

>>> fastpeft.patch(model, fastpeft.LoRA(r=16))     # adapters on, base frozen, in place
>>> fastpeft.save(model, folder)                   # PEFT's own file format
>>> fastpeft.load(fresh_model, folder)
>>> fastpeft.unpatch(model)                        # the model as it was, bitwise
"""

from fastpeft._version import __version__
from fastpeft.adapters import (
    active_adapters,
    add_adapter,
    delete_adapter,
    disable_adapters,
    merge,
    mixed_batch,
    set_adapter,
    unmerge,
)
from fastpeft.allocation.allocator import RankAllocator, orthogonal_regularization, update_and_allocate
from fastpeft.backend import get_backend, set_backend, use_backend
from fastpeft.checkpoint import hotswap, load, save
from fastpeft.combining import combine_adapters
from fastpeft.config import LoRA
from fastpeft.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    FastPeftError,
    LayerSparseError,
    PatchError,
    ShapeError,
)
from fastpeft.loraplus import loraplus_groups
from fastpeft.methods.adalora import AdaLoRA
from fastpeft.methods.bitfit import BitFit
from fastpeft.methods.bottleneck import ParallelAdapter, SeriesAdapter
from fastpeft.methods.intrinsic import IntrinsicDimension
from fastpeft.methods.ln_lora import LNLoRA
from fastpeft.methods.prompts import PrefixTuning, PromptTuning
from fastpeft.methods.vera import VeRA
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.lora import lora_linear
from fastpeft.patch_report import PatchReport
from fastpeft.patching import patch, report, unpatch
from fastpeft.planning.plan import MemoryPlan, plan
from fastpeft.sparse.adamw import LayerSparseAdamW
from fastpeft.sparse.controller import LayerSparse
from fastpeft.sparse.ist import IST
from fastpeft.sparse.schedule import LISA, BAdam, StaticImportance, TopK
from fastpeft.training_state import load_training, save_training

__all__ = [
    "IST",
    "LISA",
    "AdaLoRA",
    "BAdam",
    "BackendError",
    "BitFit",
    "CheckpointError",
    "ConfigError",
    "FastPeftError",
    "IntrinsicDimension",
    "LNLoRA",
    "LayerSparse",
    "LayerSparseAdamW",
    "LayerSparseError",
    "LoRA",
    "MemoryPlan",
    "ParallelAdapter",
    "PatchError",
    "PatchReport",
    "PrefixTuning",
    "PromptTuning",
    "RankAllocator",
    "SeriesAdapter",
    "ShapeError",
    "StaticImportance",
    "TopK",
    "VeRA",
    "__version__",
    "active_adapters",
    "add_adapter",
    "combine_adapters",
    "delete_adapter",
    "disable_adapters",
    "dora_linear",
    "get_backend",
    "hotswap",
    "load",
    "load_training",
    "lora_linear",
    "loraplus_groups",
    "merge",
    "mixed_batch",
    "orthogonal_regularization",
    "patch",
    "plan",
    "report",
    "save",
    "save_training",
    "set_adapter",
    "set_backend",
    "unmerge",
    "unpatch",
    "update_and_allocate",
    "use_backend",
]
