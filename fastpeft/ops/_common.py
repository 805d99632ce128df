"""What the LoRA and DoRA ops share: input checks, scaled casts, autocast, tokens flattened and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fastpeft.errors import ShapeError

P = ParamSpec("P")
R = TypeVar("R")


def check_inputs(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor
) -> None:
    """Raise one ShapeError that names what does not fit; nothing here reads tensor data."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"{op}: expected x [..., in_features] and weight [out_features, in_features], "
            f"got x {list(x.shape)} and weight {list(weight.shape)}"
        )
    out_features, in_features = weight.shape
    r = lora_A.shape[0]
    if lora_A.shape != (r, in_features) or lora_B.shape != (out_features, r):
        raise ShapeError(
            f"{op}: expected lora_A [r, {in_features}] and lora_B [{out_features}, r], "
            f"got lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ShapeError(f"{op}: expected bias [{out_features}], got {list(bias.shape)}")
    if x.dtype != weight.dtype:
        raise ShapeError(f"{op}: expected x in the weight's dtype {weight.dtype}, got {x.dtype}")
    device = x.device
    if not (device == weight.device and device == lora_A.device and device == lora_B.device):
        raise ShapeError(
            f"{op}: expected all tensors on one device, got x on {x.device}, weight on {weight.device}, "
            f"lora_A on {lora_A.device}, lora_B on {lora_B.device}"
        )


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast is on for x's device; some, such as meta, have none."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False  # as nearly always, for one question instead of three
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to autocast's dtype where it is on, as ``F.linear`` would; adapters keep their own dtype."""
    if not autocast_is_on(x) or x.dtype is torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a gradient of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run an op's implementation with autocast off.

    A custom op's body still sees the caller's autocast state (backward inside an autocast block does too),
    which would silently move the fp32 parts, such as DoRA's norm, to 16 bits.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        first = next(a for a in args if isinstance(a, Tensor))
        if not autocast_is_on(first):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def scaled_cast(matrix: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return ``scaling * matrix`` in ``dtype``, rounded once: the product is taken in fp32 (or fp64)."""
    if scaling == 1.0:
        return cast(matrix, dtype)
    if matrix.dtype is dtype and dtype in (torch.float32, torch.float64):
        return matrix * scaling
    return (matrix.to(accumulation_dtype(matrix.dtype)) * scaling).to(dtype)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)`` without the call (1 us) where it does nothing."""
    return t if t.dtype is dtype else t.to(dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def unflatten_tokens(y: Tensor, like: Tensor) -> Tensor:
    """[tokens, features] to [..., features], with ``like``'s leading sizes; y is a result nobody else has.

    Not a view: autograd refuses in-place changes to an op's output that is one, and ``F.relu_`` or ``clamp_``
    on a linear's output is legal. So y itself takes the new sizes; ``_unsafe_view``, which makes a tensor of
    the same memory, costs 12 us in a Function's forward, of the 50 that LoRA takes for one token.
    """
    dim = like.dim()
    if dim == 2:
        return y
    if type(y) is not Tensor or not y.is_contiguous():
        unflattened: Tensor = torch.ops.aten._unsafe_view.default(y, [*like.shape[:-1], y.shape[-1]])
        return unflattened
    if dim == 3:
        return y.resize_(like.size(0), like.size(1), y.size(1))
    return y.resize_([*like.shape[:-1], y.shape[-1]])


def flatten_tokens(x: Tensor) -> Tensor:
    """[..., features] to [tokens, features], a view wherever the strides allow one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
