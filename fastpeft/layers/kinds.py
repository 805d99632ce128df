"""Which module classes can be patched, and by what. transformers is consulted only if it is loaded."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastpeft.layers.adapter import AdapterMixin

Shape = tuple[int, int]  # (in_features, out_features)


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module is a linear layer of any kind: nn.Linear, a subclass of it, or Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d_like(module)


def adapter_class(module: nn.Module) -> type[AdapterMixin] | None:
    """Return the drop-in class for a module, or None where there is none.

    A subclass of nn.Linear or nn.Embedding keeps its own forward and has the update added to it. Not
    nn.MultiheadAttention's output projection, whose forward is never called.
    """
    from fastpeft.layers.embedding import LoRAEmbedding
    from fastpeft.layers.linear import LoRALinear

    if type(module) is nn.Linear:
        return LoRALinear
    if is_conv1d(module):
        from fastpeft.layers.conv1d import LoRAConv1D

        return LoRAConv1D
    if type(module) is nn.Embedding:
        return LoRAEmbedding
    if isinstance(module, AdapterMixin):
        return type(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, (nn.Linear, nn.Embedding)):
        from fastpeft.layers.subclass import subclass_with_adapters

        return subclass_with_adapters(type(module))
    return None


def shape_of(linear: nn.Module) -> Shape:
    """(in_features, out_features) of a linear."""
    kind: Any = linear
    if not is_conv1d_like(linear):
        return kind.in_features, kind.out_features
    rows, columns = kind.weight.shape
    return rows, columns


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D itself, whose weight is [in, out]."""
    return is_conv1d_class(type(module))


def is_conv1d_class(kind: type[nn.Module]) -> bool:
    """Whether a class is transformers' Conv1D itself."""
    # A Conv1D exists only where its module has been imported already.
    owner = sys.modules.get("transformers.pytorch_utils")
    return owner is not None and kind is owner.Conv1D


def is_conv1d_like(module: nn.Module) -> bool:
    """Whether a module is a Conv1D or made from one."""
    owner = sys.modules.get("transformers.pytorch_utils")
    return owner is not None and isinstance(module, owner.Conv1D)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is not stored as its numbers: torchao's, or bitsandbytes', packed in floats or not."""
    if not weight.is_floating_point() or type(weight).__module__.startswith("torchao."):
        return True
    return getattr(weight, "quant_state", None) is not None
