"""Second derivatives: gradients of gradients (penalties on them, Hessian products, ``functional.jvp``).

The fused backwards are no formulas that autograd could differentiate. Where a graph of the backward is being
built (``create_graph=True``), many gradients are asked for at once (``is_grads_batched``), or forward-mode AD
is at work, the gradients are made by differentiating the op's reference instead: plain operations on the
tensors that forward saved. It takes plain autograd's time and memory, and nothing of it runs in an ordinary
step.

What the saved tensors do not tell (x, which is not kept where ``lora_A`` is frozen; a mask drawn by a Triton
kernel) is refused when the second derivative is taken: the first one is right, and may be all that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpeft.errors import BackendError
from fastpeft.ops._common import autocast_is_on
from fastpeft.ops.dropout import dropout_mask

Backward = Callable[..., Any]


class UnknownError(Exception):
    """Raised by a ``by_reference`` that lacks what it needs; says what."""


def differentiable(by_reference: Backward | None = None) -> Callable[[Backward], Backward]:
    """Decorate a fused backward: ``by_reference``, of the same arguments, serves where it cannot.

    Without one, or where it raises :class:`UnknownError`, the result is the fused backward's, and
    differentiating it raises BackendError, whichever inputs are asked for. (``once_differentiable`` raises
    only where the engine passes its node: ``torch.autograd.grad`` goes round it, and returns a part of the
    sum.)
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def either(ctx: Any, *gradients: Tensor | None) -> Any:
            forward_mode = forward_ad._current_level >= 0
            if not torch.is_grad_enabled() and not forward_mode and not any(map(_is_batched, gradients)):
                return backward(ctx, *gradients)
            why = "it has no formula for it"
            if by_reference is not None:
                try:
                    return by_reference(ctx, *gradients)
                except UnknownError as unknown:
                    why = str(unknown)
            return _refusing(ctx, backward, gradients, why)

        return either

    return decorate


def gradients_of(
    dys: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    need: Sequence[bool],
    formula: Callable[..., Sequence[Tensor]],
) -> list[Tensor | None]:
    """Return the gradients of ``formula(*inputs)`` as functions of ``dys`` and ``inputs``.

    Args:
        dys: a gradient an output, None where the loss does not reach it.
        inputs: as forward saved them.
        need: whose gradients are wanted.
        formula: plain differentiable operations.
    """
    with torch.enable_grad(), _without_autocast(dys):
        # Other names for the same tensors: a parameter that two layers share is differentiated here alone.
        named = [_alias(t) if t is not None and n else t for t, n in zip(inputs, need, strict=True)]
        pairs = zip(formula(*named), dys, strict=True)
        reached = [(y, dy) for y, dy in pairs if dy is not None and y.requires_grad]
        wanted = [t for t, n in zip(named, need, strict=True) if n and t is not None]
        if not reached or not wanted:
            return [None] * len(inputs)
    # Whether the result is differentiable is the caller's mode: ``create_graph`` follows it.
    found = iter(
        torch.autograd.grad(
            [y for y, _ in reached],
            wanted,
            [dy for _, dy in reached],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return [next(found) if n and t is not None else None for t, n in zip(named, need, strict=True)]


def _is_batched(t: Tensor | None) -> bool:
    """Whether ``is_grads_batched`` is at work, whose tensors the fused backwards' ``out=`` cannot take."""
    return t is not None and torch._C._functorch.is_legacy_batchedtensor(t)


def _alias(t: Tensor) -> Tensor:
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _without_autocast(dys: Sequence[Tensor | None]) -> AbstractContextManager[object]:
    first = next((dy for dy in dys if dy is not None), None)
    if first is None or not autocast_is_on(first):
        return nullcontext()
    return torch.autocast(first.device.type, enabled=False)


def mask_of(like: Tensor, dropout_p: float, seed: Tensor | None, backend: str) -> Tensor | None:
    """Return forward's dropout mask in the shape of ``like`` [..., features], None without dropout.

    Raises:
        UnknownError: a Triton kernel drew it.
    """
    if seed is None or dropout_p == 0.0:
        return None
    if backend == "triton":
        raise UnknownError(
            "its dropout mask is drawn inside a Triton kernel: use fastpeft.set_backend('torch')"
        )
    tokens = like.detach().reshape(-1, like.shape[-1])
    return dropout_mask(tokens, dropout_p, seed).view(like.shape)


def saved_x(x: Tensor | None, like: Tensor, in_features: int, wanted: Sequence[bool]) -> Tensor:
    """Return x, or, where it was not kept, zeros in its place if no ``wanted`` gradient depends on x.

    Raises:
        UnknownError: one does.
    """
    if x is not None:
        return x
    if any(wanted):
        raise UnknownError("x is not kept where lora_A does not train: let lora_A require a gradient")
    return like.new_zeros(*like.shape[:-1], in_features)


def _refusing(ctx: Any, backward: Backward, gradients: Sequence[Tensor | None], why: str) -> Any:
    """Return ``backward``'s result tied to all it depends on, by a node that raises."""
    with torch.no_grad():
        results = backward(ctx, *gradients)
    of = [t for t in (*gradients, *ctx.saved_tensors) if t is not None and t.requires_grad]
    is_one = not isinstance(results, tuple)
    results = (results,) if is_one else results
    there = [t for t in results if t is not None]
    if not of or not there:
        return results[0] if is_one else results
    op = type(ctx).__name__.removesuffix("Backward").lstrip("_")
    tied = iter(_Refusal.apply(f"{op} cannot be differentiated twice: {why}", len(there), *there, *of))  # type: ignore[no-untyped-call]
    results = tuple(None if t is None else next(tied) for t in results)
    return results[0] if is_one else results


class _Refusal(torch.autograd.Function):
    """Hands its first ``count`` tensors on; backward raises."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise BackendError(ctx.message)
