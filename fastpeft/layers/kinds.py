"""Which module classes can be patched, and by what. transformers is consulted only if it is loaded."""

from __future__ import annotations

import sys

from torch import nn

from fastpeft.layers.adapter import AdapterMixin


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a linear layer of any kind: nn.Linear, a subclass of it, or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def adapter_class(module: nn.Module) -> type[AdapterMixin] | None:
    """Return the drop-in class for a module, or None where there is none.

    Exact classes only: a subclass of nn.Linear may compute something else (quantised linears do), and
    nn.MultiheadAttention's output projection is a subclass whose forward is never called.
    """
    if type(module) is nn.Linear:
        from fastpeft.layers.linear import LoRALinear

        return LoRALinear
    if is_conv1d(module):
        from fastpeft.layers.conv1d import LoRAConv1D

        return LoRAConv1D
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, whose weight is [in, out]."""
    # A Conv1D exists only where its module has been imported already.
    owner = sys.modules.get("transformers.pytorch_utils")
    return owner is not None and type(module) is owner.Conv1D
