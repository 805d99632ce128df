"""LoRA's update on a base product that somebody else made: ``y = base + scaling * (drop(x) A^T) B^T``.

For bases whose product is not ours: quantised linears, modules with hooks, a second adapter on a result.
Where the weight is at hand, :mod:`fastpeft.ops.lora` fuses the base product too.

Backward, with ``S = drop(x) A^T`` and ``s = scaling``::

    dbase = dY      dS = s dY B      dB = s dY^T S      dA = dS^T drop(x)      dx = mask * (dS A)

Saved for backward: ``S [tokens, r]`` and references to ``x`` (only where ``lora_A`` trains), ``lora_A`` and
``lora_B``. No cast copy of ``x`` and no dropout mask: the mask is drawn again from its seed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastpeft import backend as backends
from fastpeft.errors import ShapeError
from fastpeft.ops import few_tokens, kernel_paths, remade
from fastpeft.ops._common import (
    accumulation_dtype,
    autocast_is_on,
    flatten_tokens,
    needs_gradients,
    scaled_cast,
    unflatten_tokens,
    without_autocast,
)
from fastpeft.ops.cpu_gemm import products_in_fp32
from fastpeft.ops.dropout import draw_seeds, keep, keep_, keep_bits, keep_scale
from fastpeft.ops.eager import is_transformed, runs_eagerly
from fastpeft.ops.probability import Probability, as_inputs, dropped, from_inputs, is_dropping, number
from fastpeft.ops.second_order import differentiable, gradients_of, mask_of, saved_x


def lora_add_reference(
    base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """The formula, line for line, in whatever dtype it is given; ``mask`` holds 0 or 1/(1-p)."""
    dropped = x if mask is None else x * mask
    return base + scaling * ((dropped @ lora_A.T) @ lora_B.T)


def lora_add(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout_p: Probability = 0.0,
    overwrite: bool = False,
) -> Tensor:
    """LoRA's update added to a base product, as one differentiable op.

    Args:
        base: ``[..., out_features]``, the base layer's result for ``x``.
        x: ``[..., in_features]``, any strides, zero tokens allowed, in base's dtype (or autocast's).
        lora_A: ``[r, in_features]``, base's dtype or fp32.
        lora_B: ``[out_features, r]``, likewise.
        scaling: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA.
        dropout_p: probability of zeroing an element of x on its way to ``lora_A``; 0 outside training.
        overwrite: allow the result to take base's memory; only where nobody else reads base.

    Returns:
        ``[..., out_features]`` in base's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        BackendError: the backend chosen with :func:`fastpeft.set_backend` cannot run here.
    """
    if x.dtype != base.dtype and autocast_is_on(x):
        x = x.to(base.dtype)
    _check(base, x, lora_A, lora_B)
    if is_transformed():
        mask = dropped(torch.ones_like(x), dropout_p) if is_dropping(dropout_p) else None
        return lora_add_reference(base, x, lora_A.to(x.dtype), lora_B.to(x.dtype), scaling, mask)
    backend = backends.resolve(x, op="lora_add")
    seed = draw_seeds(x, [dropout_p], backend)
    tensors = (base, x, lora_A, lora_B)
    if runs_eagerly(x):
        overwrite = overwrite and base.is_contiguous() and not base._is_view()
        options = (scaling, number(dropout_p), seed, backend)
        if needs_gradients(*tensors):
            return _LoRAAdd.apply(*tensors, *options, overwrite)  # type: ignore[no-any-return, no-untyped-call]
        if not overwrite:
            return _forward(*tensors, *options)[0]
        _added(flatten_tokens(base), flatten_tokens(x), lora_A, lora_B, *options)
        return base
    ps, live_p = as_inputs([dropout_p])
    y: Tensor = torch.ops.fastpeft.lora_add(*tensors, scaling, ps, live_p, seed, backend)[0]
    return y


def _check(base: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    if x.dim() < 1 or lora_A.dim() != 2 or lora_B.dim() != 2 or x.shape[-1] != lora_A.shape[1]:
        raise ShapeError(
            f"lora_add: expected x [..., in_features] and lora_A [r, in_features], "
            f"got x {list(x.shape)} and lora_A {list(lora_A.shape)}"
        )
    expected = [*x.shape[:-1], lora_B.shape[0]]
    if list(base.shape) != expected or lora_B.shape[1] != lora_A.shape[0]:
        raise ShapeError(
            f"lora_add: expected base [..., out_features] with x's leading sizes and "
            f"lora_B [out_features, r], "
            f"got x {list(x.shape)}, base {list(base.shape)}, lora_A {list(lora_A.shape)} and "
            f"lora_B {list(lora_B.shape)}"
        )
    if x.dtype != base.dtype:
        raise ShapeError(f"lora_add: expected x in base's dtype {base.dtype}, got {x.dtype}")
    if not (x.device == base.device == lora_A.device == lora_B.device):
        raise ShapeError(
            f"lora_add: expected all tensors on one device, got base on {base.device}, x on {x.device}, "
            f"lora_A on {lora_A.device}, lora_B on {lora_B.device}"
        )


def _product_dtype(tokens: Tensor, *, backward: bool = False) -> torch.dtype:
    """The dtype that the torch backend multiplies in (:mod:`cpu_gemm`, :mod:`few_tokens`)."""
    in_fp32 = few_tokens.serves(tokens) or products_in_fp32(tokens, backward=backward)
    return torch.float32 if in_fp32 else tokens.dtype


@without_autocast
def _added(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` [tokens, out_features], contiguous, with the update added in place, and S [tokens, r]."""
    if backend == "triton":
        return kernel_paths.kernels().lora_add_(y, x, lora_A, lora_B, scaling, dropout_p, seed)  # type: ignore[no-any-return]
    dtype = _product_dtype(x)
    kept, k = x.to(dtype), 1.0
    if seed is not None:
        kept, k = keep(kept, keep_bits(x.shape, dropout_p, seed, kept)), keep_scale(dropout_p)
    S = kept @ scaled_cast(lora_A, k, dtype).t()
    Bt = lora_B.to(dtype).t()
    if dtype is y.dtype:
        y.addmm_(S, Bt, alpha=scaling)
    else:
        y.copy_(y.to(dtype).addmm_(S, Bt, alpha=scaling))
    return y, S.to(x.dtype)


def _forward(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return y [..., out_features] and S [tokens, r]."""
    y = base.clone(memory_format=torch.contiguous_format)
    _, S = _added(flatten_tokens(y), flatten_tokens(x), lora_A, lora_B, scaling, dropout_p, seed, backend)
    return y, S


@without_autocast
def _gradients(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    """Return the gradients that ``need`` asks for, out of (x, lora_A, lora_B), in that order."""
    dy2d = flatten_tokens(dy)
    tokens = None if x is None else flatten_tokens(x)
    need_x, need_A, need_B = need
    dx: Tensor | None
    if backend == "triton":
        dx, dA, dB = kernel_paths.kernels().lora_add_backward(
            dy2d,
            tokens,
            lora_A,
            lora_B,
            S,
            scaling,
            dropout_p,
            seed,
            need_x=need_x,
            need_A=need_A,
            need_B=need_B,
        )
    else:
        dx, dA, dB = _torch_gradients(dy2d, tokens, lora_A, lora_B, S, scaling, dropout_p, seed, need)
    if dx is not None:
        dx = unflatten_tokens(dx, dy)
    return [gradient for gradient in (dx, dA, dB) if gradient is not None]


def _torch_gradients(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    need: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_A, need_B = need
    dtype = _product_dtype(dy, backward=True)
    exact = accumulation_dtype(dtype)
    g, bits, k = dy.to(dtype), None, 1.0
    if seed is not None and (need_x or need_A):
        like = g.new_empty(0)
        bits = keep_bits((dy.shape[0], lora_A.shape[1]), dropout_p, seed, like)
        k = keep_scale(dropout_p)
    dx = dA = dB = None
    if need_x or need_A:
        dS = g @ scaled_cast(lora_B, scaling, dtype)
    if need_x:
        dx = dS @ scaled_cast(lora_A, k, dtype)
        dx = (dx if bits is None else keep_(dx, bits)).to(dy.dtype)
    if need_A:
        assert x is not None
        kept = x.to(dtype)
        dA = dS.t() @ (kept if bits is None else keep(kept, bits))
        dA = scaled_cast(dA.to(exact), k, lora_A.dtype)
    if need_B:
        dB = scaled_cast((g.t() @ S.to(dtype)).to(exact), scaling, lora_B.dtype)
    return dx, dA, dB


def _forward_op(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    (p,), seed = from_inputs(dropout_p, live_p, seed)
    return _forward(base, x, lora_A, lora_B, scaling, p, seed, backend)


def _gradients_op(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    (p,), seed = from_inputs(dropout_p, live_p, seed)
    return _gradients(dy, x, lora_A, lora_B, S, scaling, p, seed, backend, need)


_lora_add = torch.library.custom_op("fastpeft::lora_add", _forward_op, mutates_args=())
_lora_add_backward = torch.library.custom_op("fastpeft::lora_add_backward", _gradients_op, mutates_args=())


@_lora_add.register_fake
def _(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    return y, x.new_empty(math.prod(x.shape[:-1]), lora_A.shape[0])


@_lora_add_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    gradients = [
        dy.new_empty(*dy.shape[:-1], lora_A.shape[1]) if need[0] else None,
        torch.empty_like(lora_A) if need[1] else None,
        torch.empty_like(lora_B) if need[2] else None,
    ]
    return [gradient for gradient in gradients if gradient is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], S: Tensor) -> None:
    _, x, lora_A, lora_B, scaling, dropout_p, live_p, seed, backend = inputs
    need_A = ctx.needs_input_grad[2]
    remade.save(ctx, [x if need_A else None, lora_A, lora_B, S, live_p, seed])
    ctx.set_materialize_grads(False)
    ctx.options = (scaling, dropout_p, backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor | None, _dS: None = None) -> tuple[Tensor | None, ...]:
    base_grad, x_grad, A_grad, B_grad = ctx.needs_input_grad[:4]
    if dy is None:
        return (None,) * 9
    x, lora_A, lora_B, S, live_p, seed = remade.saved(ctx)
    scaling, dropout_p, backend = ctx.options
    need = [x_grad, A_grad, B_grad]
    gradients_of = _gradients_op if runs_eagerly(dy) else torch.ops.fastpeft.lora_add_backward
    inputs = (dy, x, lora_A, lora_B, S, scaling, dropout_p, live_p, seed, backend, need)
    gradients = iter(gradients_of(*inputs))
    dx, dA, dB = (next(gradients) if needed else None for needed in need)
    return dy if base_grad else None, dx, dA, dB, None, None, None, None, None


_lora_add.register_autograd(_backward, setup_context=_setup_context)


def _by_reference(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    base_grad, *need = ctx.needs_input_grad[:4]
    x, lora_A, lora_B, _S, _live_p, seed = remade.saved(ctx)
    scaling, (p,), backend = ctx.options
    x = saved_x(x, dy, lora_A.shape[1], need[1:])
    mask = mask_of(x, p, seed, backend)

    def formula(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor]:
        zero = x.new_zeros(())
        return (lora_add_reference(zero, x, A.to(x.dtype), B.to(x.dtype), scaling, mask),)

    found = gradients_of((dy,), (x, lora_A, lora_B), need, formula)
    return dy if base_grad else None, *found, *(None,) * 5


class _LoRAAdd(torch.autograd.Function):
    """``fastpeft::lora_add`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, overwrite = inputs
        base: Tensor = operands[0]
        if overwrite:
            y = base
            ctx.mark_dirty(base)
            rest = (flatten_tokens(operands[1]), *operands[2:])
            _, S = _added(y.view(-1, y.shape[-1]) if y.dim() != 2 else y, *rest)
        else:
            y, S = _forward(*operands)
        *before, dropout_p, seed, backend = operands
        _save(ctx, (*before, [dropout_p], None, seed, backend), S)
        return y

    @staticmethod
    @differentiable(_by_reference)
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy)  # as many: no live_p, but overwrite
