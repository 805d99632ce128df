"""Unsloth's, Axolotl's and Liger's fused functions on a PEFT model, where a GPU and they are.

Unsloth and Axolotl have functions for a linear (`o`), q/k/v and a SwiGLU MLP of PEFT's layers; they are
called on the very blocks that PEFT's contender has. Importing Unsloth changes transformers and PEFT in the
process: leave it out (`--peers`) where PEFT's own time matters. Liger has no LoRA kernels: its RMSNorm,
SwiGLU and fused loss stand around PEFT's layers in a whole model (suite `step`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.adapter import Adapter
from bench.peer_linears import import_failure

LAYER_PEERS = {"unsloth": "unsloth.kernels.fast_lora", "axolotl": "axolotl.kernels.lora"}
FUNCTIONS = {"linear": "apply_lora_o", "qkv": "apply_lora_qkv", "mlp": "apply_lora_mlp_swiglu"}


def missing(name: str, method: str, device: torch.device) -> str | None:
    """Why a peer cannot run here, or None."""
    if device.type != "cuda":
        return f"{name}'s kernels need a GPU"
    if name == "unsloth" and method == "dora":
        return "unsloth has no DoRA kernels"
    return import_failure("liger_kernel" if name == "liger" else LAYER_PEERS[name])


def forward_of(name: str, block: str, module: Any, adapter: Adapter) -> Callable[[Tensor], Any]:
    """The peer's function for `block`, on PEFT's layers in `module`.

    Raises:
        RuntimeError: it has none for this adapter.
    """
    device = next(module.parameters()).device
    if reason := missing(name, adapter.method, device):
        raise RuntimeError(reason)
    if adapter.dropout and name == "unsloth":
        raise RuntimeError("unsloth's kernels have no dropout")
    function = getattr(importlib.import_module(LAYER_PEERS[name]), FUNCTIONS[block])
    owner = SimpleNamespace(o_proj=module.proj, training=True) if block == "linear" else module
    # Axolotl's would otherwise write x's gradient over x, and the next call would read it.
    options = {"inplace": False} if name == "axolotl" and block != "linear" else {}
    return lambda x: function(owner, x, **options)


def apply_liger(model: nn.Module) -> nn.Module:
    """Liger's modules and loss in a Llama model that already exists; other models stay as they are."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    # RoPE is replaced in transformers' module, so for every contender at once: not here.
    apply_liger_kernel_to_llama(
        rope=False, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True,
        model=model,
    )  # fmt: skip
    return model
