"""One adapter of a PEFT layer, read afresh at every call: between two, people switch, rescale and swap.

Module internals are read from ``_modules`` and ``_parameters``: ``nn.Module.__getattr__`` costs half a
microsecond a name, and a call reads a dozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.layers.adapted import Adapter
from fastpeft.layers.norm_cache import PLAIN_TYPES
from fastpeft.ops.probability import probability_of

_ACTIVATED = "ALoraLinearVariant"
# Forwards that are LoRA's: none, minor components' (arXiv 2604.01694), block diagonal ones, and, for its
# tokens, activated LoRA's.
_LIKE_LORA = ("NoneType", "MiCALinearVariant", "BdLoraLinearVariant", _ACTIVATED)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would do more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def global_hooks() -> bool:
    """Whether hooks are registered for every module, inner ones included."""
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def is_plain(tensor: object) -> bool:
    """Whether a tensor is what it looks like: no DTensor, quantised or other subclass."""
    return type(tensor) in PLAIN_TYPES or _is_fake(tensor)


def _is_fake(tensor: object) -> bool:
    return isinstance(tensor, torch._subclasses.fake_tensor.FakeTensor)


def is_replaced(module: nn.Module) -> bool:
    """Whether other code put its own forward in the module's place."""
    return "forward" in module.__dict__


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """``module.name`` of a parameter, past ``nn.Module.__getattr__`` where it is one as registered."""
    registered = module._parameters
    return registered[name] if name in registered else getattr(module, name)


def names_in(module: Any) -> Any:
    """Return what the names of a PEFT linear's adapters can be looked up in."""
    lora_A = module._modules["lora_A"]
    # A ParameterDict itself, not its registry: an nn.DataParallel replica's is empty.
    return lora_A if isinstance(lora_A, nn.ParameterDict) else lora_A._modules


def _read_svd(module: Any, name: str) -> Adapter | str:
    """AdaLoRA's, whose matrices are bare Parameters (:mod:`fastpeft.layers.adalora`)."""
    A, E, B = (getattr(module, kind)[name] for kind in ("lora_A", "lora_E", "lora_B"))
    dropout = module._modules["lora_dropout"]._modules[name]
    if has_hooks(dropout):
        return "hooks on lora_dropout"
    for tensor, what in ((A, "lora_A"), (E, "lora_E"), (B, "lora_B")):
        if not is_plain(tensor):
            return f"{what} is {type(tensor).__name__}, not a plain tensor"
    if A.dim() != 2 or B.dim() != 2 or E.shape != (A.shape[0], 1) or B.shape[1] != A.shape[0]:
        return "lora_A, lora_E or lora_B is a shard"
    if A.shape[0] == 0:
        return "an adapter of rank 0"
    if (p := probability_of(dropout)) is None:
        return f"lora_dropout is {dropout}"
    # The rank that PEFT divides by is a tensor: read as a number, it would stall a GPU at every call.
    E = E * (module.scaling[name] / (module.ranknum[name] + 1e-5))
    return Adapter(name, A * E, B, None, 1.0, p, None)


def read(module: Any, name: str) -> Adapter | str:
    """Return the adapter ``name`` of a PEFT linear, or why it is PEFT's own business."""
    modules = module._modules
    if "lora_E" in modules:
        return _read_svd(module, name)
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    A, B = _matrix(lora_A, "lora_A"), _matrix(lora_B, "lora_B")
    if isinstance(A, str):
        return A
    if isinstance(B, str):
        return B
    if A.dim() != 2 or B.dim() != 2 or B.shape[1] != A.shape[0]:
        return "lora_A or lora_B is a shard"  # FSDP1 wraps trainable leaves apart
    if type(lora_A) is nn.Linear and parameter_of(lora_A, "bias") is not None:
        return "lora_A has a bias"
    bias = parameter_of(lora_B, "bias") if type(lora_B) is nn.Linear else None
    if has_hooks(dropout):
        return "hooks on lora_dropout"
    if (p := probability_of(dropout)) is None:
        return f"lora_dropout is {dropout}"
    magnitude: Tensor | None = None
    variants = module.lora_variant
    variant = type(variants.get(name)).__name__ if variants else "NoneType"
    if variant == "DoraLinearVariant":
        found = _magnitude(module, name, dropout)
        if isinstance(found, str):
            return found
        magnitude = found
        if bias is not None:
            return "DoRA with lora_bias"
    elif variant == "KasaLinearVariant":
        if name in (getattr(module, "_lora_kasa_truncation_deferred", None) or ()):
            return "KaSA whose truncation of the base is still due"
        B = B * module.lora_diag[name]  # arXiv 2412.06071: scaling * B diag(s) A
    elif variant not in _LIKE_LORA and not _acts_as_lora(module, name, variant):
        return f"variant {variant.removesuffix('Variant')}"
    scaling = module.scaling[name]
    if isinstance(scaling, Tensor):
        # A hot-swap compiled for many adapters keeps the scaling in a tensor; read as a number, it would be a
        # constant of the compiled code.
        B, bias, scaling = B * scaling, None if bias is None else bias * scaling, 1.0
    elif bias is not None:
        bias = bias * scaling
    return Adapter(name, A, B, bias, scaling, p, magnitude)


def _matrix(inner: Any, what: str) -> Tensor | str:
    """Return the weight of lora_A or lora_B (``what``), or why calling it is more than a product with it."""
    is_linear = type(inner) is nn.Linear
    if not is_linear and not _is_block_diagonal(inner):
        return f"{what} is {type(inner).__name__}, not nn.Linear"
    if has_hooks(inner):
        return f"hooks on {what}"
    if is_replaced(inner):
        return f"forward of {what} replaced by other code"
    weight = parameter_of(inner, "weight")
    if weight is None or not is_plain(weight):
        return f"{what} is {type(weight).__name__}, not a plain tensor"
    if not is_linear and weight.dim() == 2:
        weight = inner.weight_as_blockdiagonal_matrix()
    return weight


def _is_block_diagonal(inner: Any) -> bool:
    """Whether a matrix is BD-LoRA's: stored as the blocks on its diagonal, one below the other."""
    return type(inner).__name__ == "BlockDiagonalLinear" and type(inner).__module__.startswith("peft.")


def _acts_as_lora(module: Any, name: str, variant: str) -> bool:
    """Whether a variant that trains in its own way is LoRA for this call, as these two are in evaluation."""
    if variant == "VeloraLinearVariant":  # it is autograd that keeps less of x
        return not (module.training and torch.is_grad_enabled())
    if variant == "MontecloraLinearVariant":  # it samples in training; its sampler may still have to be made
        return not module.training and name in module.lora_monteclora_sampler
    return False


def is_activated(module: Any, name: str) -> bool:
    """Whether an adapter is an activated LoRA (arXiv 2504.12397): only for tokens from its invocation on."""
    return type(module.lora_variant.get(name)).__name__ == _ACTIVATED


def _magnitude(module: Any, name: str, dropout: nn.Module) -> Tensor | str:
    layer = module._modules["lora_magnitude_vector"]._modules[name]
    if type(layer).__name__ != "DoraLinearLayer" or has_hooks(layer) or is_replaced(layer):
        return "a magnitude layer of another kind, or with hooks"
    if type(dropout) is nn.Dropout and dropout.training != module.training:
        return "DoRA whose dropout is in another mode than its layer"
    if module.ephemeral_gpu_offload:
        return "ephemeral_gpu_offload"
    magnitude: Tensor = layer.weight
    if not is_plain(magnitude) or magnitude.dim() != 1:
        return "the magnitude is a shard"
    return magnitude
