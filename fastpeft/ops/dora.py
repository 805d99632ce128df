"""DoRA linear (Liu et al. 2024, arXiv 2402.09353), with torch's [out, in] weights a norm per output row.

::

    n = ||W + s B A||_row      c = m / n, detached (section 4.3 of the paper)      s = scaling
    y = c * (x W^T + s S B^T) + bias                                  S = drop(x) A^T
    y = x W^T + (c - 1) * (drop(x) W^T) + c * s S B^T + bias          with dropout, PEFT's meaning

The second line, the default, is what PEFT and the paper's code compute: the base product drops its input too,
but for the part that a plain linear would give. The first, ``dropout_on_base=False``, is torchtune's and
Axolotl's. Without dropout the two are one.

The norm is factored (:mod:`fastpeft.ops.row_norm`): no [out_features, in_features] temporary exists.

Backward, with ``g = c * dY`` and ``z = x W^T + s S B^T``, or ``drop(x) W^T + s S B^T`` in the second line::

    dS = s g B      dB = s g^T S      dA = dS^T drop(x)      dm = colsum(dY * z) / n      dbias = colsum(dY)
    dx = g W + mask * (dS A)                                    the first line
    dx = dY W + mask * (((c - 1) * dY) W + dS A)                the second

Saved for backward: ``S [tokens, r]``, ``n [out_features]``, references to ``x``, ``weight`` and the adapter,
and one [tokens, out_features] tensor for dm, only where the magnitude trains: the output itself (often alive
anyway), as ``dm = colsum(dY * y) / m``; or z, where y does not tell it: beside a bias (``y - bias`` would
cancel: Qwen2's k_proj biases reach hundreds), with the second line's dropout, and in fp16, whose range is too
short for a row that is scaled by almost nothing.

A row with n = 0 gets c = 0, not NaN; one with m = 0 gets a c of 1e-30 (:data:`MIN_ROW_SCALE`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft import backend as backends
from fastpeft.errors import ShapeError
from fastpeft.ops import kernel_paths
from fastpeft.ops._common import (
    accumulation_dtype,
    autocast_inputs,
    cast,
    check_inputs,
    flatten_tokens,
    needs_gradients,
    unflatten_tokens,
    without_autocast,
)
from fastpeft.ops.dropout import draw_seeds
from fastpeft.ops.eager import is_transformed, runs_eagerly
from fastpeft.ops.probability import Probability, as_inputs, dropped, from_inputs, is_dropping, number
from fastpeft.ops.products import Dropout, Need
from fastpeft.ops.row_norm import checked_row_scale, magnitude_gradient, row_norm, row_norm_squared
from fastpeft.ops.second_order import differentiable, gradients_of, mask_of, saved_x
from fastpeft.ops.ways import dora_forward, way_for


def dora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    dropout_on_base: bool = True,
    norm: Tensor | None = None,
) -> Tensor:
    """The formula with the full [out_features, in_features] update, in whatever dtype it is given.

    With a ``norm`` that is at hand the update is not formed, and zero rows are zero.
    """
    dropped = x if mask is None else x * mask
    if norm is None:
        norm = torch.linalg.vector_norm(weight + scaling * (lora_B @ lora_A), dim=1).detach()
        c = magnitude / norm
    else:
        c = torch.where(norm > 0, magnitude / norm, 0.0).to(x.dtype)
    base = dropped if dropout_on_base else x
    y = x @ weight.T + (c - 1) * (base @ weight.T) + c * scaling * ((dropped @ lora_A.T) @ lora_B.T)
    return y if bias is None else y + bias


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    dropout_p: Probability = 0.0,
    dropout_on_base: bool = True,
    norm: Tensor | None = None,
) -> Tensor:
    """DoRA linear as one differentiable op.

    Args:
        x: ``[..., in_features]``, any strides, zero tokens allowed.
        weight: ``[out_features, in_features]``, any strides, x's dtype.
        bias: ``[out_features]`` or None; outside the row scale.
        lora_A: ``[r, in_features]``, x's dtype or fp32.
        lora_B: ``[out_features, r]``, likewise.
        magnitude: ``[out_features]``, DoRA's m.
        scaling: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA.
        dropout_p: probability of zeroing an element of x in the adapter's part; 0 outside training.
        dropout_on_base: which of the two meanings of dropout (module docstring).
        norm: ``||W + s B A||_row`` [out_features] in fp32 (fp64), as :func:`row_norm` gives it, where the
            caller keeps it; no gradient goes through it.

    Returns:
        ``[..., out_features]`` in x's dtype (in autocast's, where that is on). The output is kept for
        backward, so autograd refuses to have it changed in place.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        BackendError: the backend chosen with :func:`fastpeft.set_backend` cannot run here.
    """
    base_weight = weight
    x, weight, bias = autocast_inputs(x, weight, bias)
    check_inputs("dora_linear", x, weight, bias, lora_A, lora_B)
    if magnitude.shape != (weight.shape[0],):
        raise ShapeError(f"dora_linear: expected magnitude [{weight.shape[0]}], got {list(magnitude.shape)}")
    if norm is not None and norm.shape != magnitude.shape:
        raise ShapeError(f"dora_linear: expected norm [{weight.shape[0]}], got {list(norm.shape)}")
    if (weight.requires_grad and torch.is_grad_enabled()) or is_transformed():
        # The op has no gradient for W (its point is a frozen base), plain autograd has.
        mask = dropped(torch.ones_like(x), dropout_p) if is_dropping(dropout_p) else None
        A, B, m = lora_A.to(x.dtype), lora_B.to(x.dtype), magnitude.to(x.dtype)
        return dora_linear_reference(x, weight, bias, A, B, m, scaling, mask, dropout_on_base)
    if norm is not None and norm.requires_grad:
        norm = norm.detach()
    if norm is None and weight.dtype != base_weight.dtype:
        with torch.no_grad():  # of the weight itself, not of autocast's copy
            norm = row_norm(base_weight, lora_A, lora_B, scaling, row_norm_squared(base_weight))
    backend = backends.resolve(x, op="dora_linear")
    seed = draw_seeds(x, [dropout_p], backend)
    on_base = dropout_on_base and seed is not None
    base = (x, weight, bias, lora_A, lora_B, magnitude, norm, scaling)
    if runs_eagerly(x):
        options = (number(dropout_p), seed, on_base, backend)
        if needs_gradients(x, bias, lora_A, lora_B, magnitude):
            return _DoRALinear.apply(*base, *options)  # type: ignore[no-any-return, no-untyped-call]
        if backend == "triton" and kernel_paths.decodes(x, lora_A, seed):
            return _decode(*base)
        # The choice among kernels depends on whether z is kept, and a recomputation with gradients keeps it.
        return _forward(*base, *options, keep=backend == "triton")[0]
    ps, live_p = as_inputs([dropout_p])
    y: Tensor = torch.ops.fastpeft.dora_linear(*base, ps, live_p, seed, on_base, backend)[0]
    return y


def keeps_product(x: Tensor, bias: Tensor | None, on_base: bool) -> bool:
    """Whether dm needs z kept, because y does not tell it (module docstring)."""
    return bias is not None or on_base or x.dtype is torch.float16


@without_autocast
def _decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float,
) -> Tensor:
    """Return y for a few tokens that nobody differentiates."""
    tokens = flatten_tokens(x)
    y = kernel_paths.dora_decode(tokens, weight, bias, lora_A, lora_B, magnitude, norm, scaling)
    return unflatten_tokens(y, x)


@without_autocast
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    on_base: bool,
    backend: str,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return y [..., out_features], S [tokens, r], z where it is kept, and n."""
    tokens = flatten_tokens(x)
    keep_z = keep and keeps_product(x, bias, on_base)
    z: Tensor | None
    if backend == "triton":
        y, S, z, n = kernel_paths.dora_forward(
            tokens,
            weight,
            bias,
            lora_A,
            lora_B,
            magnitude,
            norm,
            scaling,
            dropout_p,
            seed,
            drop_base=on_base,
            keep_z=keep_z,
        )
    else:
        n = norm if norm is not None else row_norm(weight, lora_A, lora_B, scaling, row_norm_squared(weight))
        dropout = None if seed is None else Dropout(p=dropout_p, seed=seed, on_base=on_base)
        scale = checked_row_scale(magnitude, n)
        y, S, z = dora_forward(tokens, weight, bias, lora_A, lora_B, scaling, dropout, scale, keep_z)
    return unflatten_tokens(y, x), S, z, n if norm is None else norm


@without_autocast
def _gradients(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    S: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    on_base: bool,
    kept_is_z: bool,
    backend: str,
    need: Sequence[bool],
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (x, bias, lora_A, lora_B, magnitude), None where ``need`` asks for none."""
    need_x, need_bias, need_A, need_B, need_m = need
    dy2d = flatten_tokens(dy)
    tokens = None if x is None else flatten_tokens(x)
    kept2d = None if kept is None else flatten_tokens(kept)
    if backend == "triton":
        dx, dA, dB, dm, dbias = kernel_paths.kernels().dora_backward(
            dy2d,
            tokens,
            kept2d,
            weight,
            lora_A,
            lora_B,
            magnitude,
            norm,
            S,
            scaling,
            dropout_p,
            seed,
            drop_base=on_base,
            kept_is_z=kept_is_z,
            need_x=need_x,
            need_A=need_A,
            need_B=need_B,
            need_m=need_m,
            need_bias=need_bias,
            bias_dtype=bias_dtype,
        )
    else:
        scale = checked_row_scale(magnitude, norm)
        way = way_for(dy2d, backward=True)
        dropout = None if seed is None else Dropout(p=dropout_p, seed=seed, on_base=on_base)
        wanted = Need(x=need_x, A=need_A, B=need_B, bias=need_bias, dot=need_m)
        result = way.backward(
            dy2d, tokens, weight, lora_A, lora_B, S, scaling, dropout, wanted, scale, kept2d
        )
        dx = result.x
        dA = None if result.A is None else cast(result.A, lora_A.dtype)
        dB = None if result.B is None else cast(result.B, lora_B.dtype)
        dbias = None if result.bias is None else result.bias.to(bias_dtype)
        dm = None
        if result.dot is not None:
            dm = magnitude_gradient(result.dot, scale, magnitude, norm, kept_is_z=kept_is_z)
    if dx is not None:
        dx = unflatten_tokens(dx, dy)
    return dx, dbias, dA, dB, dm


def _forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    on_base: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, S, z (empty if not kept) and n (empty if it was given)."""
    (p,), seed = from_inputs(dropout_p, live_p, seed)
    base = (x, weight, bias, lora_A, lora_B, magnitude, norm, scaling)
    y, S, z, n = _forward(*base, p, seed, on_base, backend)
    return y, S, y.new_empty(0, weight.shape[0]) if z is None else z, n if norm is None else n.new_empty(0)


def _gradients_op(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    S: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    on_base: bool,
    kept_is_z: bool,
    backend: str,
    need: list[bool],
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    (p,), seed = from_inputs(dropout_p, live_p, seed)
    tensors = (dy, x, kept, weight, lora_A, lora_B, magnitude, S, norm)
    found = _gradients(*tensors, scaling, p, seed, on_base, kept_is_z, backend, need, bias_dtype)
    return [gradient for gradient in found if gradient is not None]


_dora_linear = torch.library.custom_op("fastpeft::dora_linear", _forward_op, mutates_args=())
_dora_linear_backward = torch.library.custom_op(
    "fastpeft::dora_linear_backward", _gradients_op, mutates_args=()
)


@_dora_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    on_base: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, out_features = math.prod(x.shape[:-1]), weight.shape[0]
    return (
        x.new_empty(*x.shape[:-1], out_features),
        x.new_empty(tokens, lora_A.shape[0]),
        x.new_empty(tokens if keeps_product(x, bias, on_base) else 0, out_features),
        x.new_empty(out_features if norm is None else 0, dtype=accumulation_dtype(weight.dtype)),
    )


@_dora_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    kept: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    S: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: list[float],
    live_p: Tensor | None,
    seed: Tensor | None,
    on_base: bool,
    kept_is_z: bool,
    backend: str,
    need: list[bool],
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    gradients = [
        dy.new_empty(*dy.shape[:-1], weight.shape[1]),
        dy.new_empty(weight.shape[0], dtype=bias_dtype),
        torch.empty_like(lora_A),
        torch.empty_like(lora_B),
        torch.empty_like(magnitude),
    ]
    return [gradient for gradient, needed in zip(gradients, need, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, lora_A, lora_B, magnitude, norm, *options = inputs
    scaling, dropout_p, live_p, seed, on_base, backend = options
    y, S, z, computed = output
    x, kept, keeps_z = _kept(ctx, x, bias, on_base, y, z)
    norm = computed if norm is None else norm
    ctx.save_for_backward(x, kept, weight, lora_A, lora_B, magnitude, S, norm, live_p, seed)
    ctx.set_materialize_grads(False)
    ctx.options = (scaling, dropout_p, on_base, keeps_z, backend, None if bias is None else bias.dtype)
    ctx.mark_non_differentiable(*output[1:])


def _kept(
    ctx: Any, x: Tensor, bias: Tensor | None, on_base: bool, y: Tensor, z: Tensor | None
) -> tuple[Tensor | None, Tensor | None, bool]:
    """Return x where dA needs it, what gives dm, and whether that is z."""
    keeps_z = keeps_product(x, bias, on_base)
    kept = z if keeps_z else y
    need_A, need_m = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    return x if need_A else None, kept if need_m else None, keeps_z


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need_x, _weight, *of_parameters = ctx.needs_input_grad[:6]
    if dy is None:
        return (None,) * 13
    *tensors, live_p, seed = ctx.saved_tensors
    scaling, dropout_p, on_base, keeps_z, backend, bias_dtype = ctx.options
    need = [need_x, *of_parameters]
    options = (scaling, dropout_p, live_p, seed, on_base, keeps_z, backend, need, bias_dtype)
    found = iter(torch.ops.fastpeft.dora_linear_backward(dy, *tensors, *options))
    dx, dbias, dA, dB, dm = (next(found) if needed else None for needed in need)
    return dx, None, dbias, dA, dB, dm, *(None,) * 7


_dora_linear.register_autograd(_backward, setup_context=_setup_context)


def _by_reference(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    need_x, _weight, need_bias, need_A, need_B, need_m = ctx.needs_input_grad[:6]
    x, _kept, weight, lora_A, lora_B, magnitude, _S, norm, seed = ctx.saved_tensors
    scaling, p, on_base, _keeps_z, backend, bias_dtype = ctx.options
    x = saved_x(x, dy, weight.shape[1], (need_A, need_B, need_m))
    mask = mask_of(x, p, seed, backend)

    def formula(x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor) -> tuple[Tensor]:
        A, B = A.to(x.dtype), B.to(x.dtype)
        return (dora_linear_reference(x, weight, bias, A, B, m, scaling, mask, on_base, norm),)

    bias = weight.new_zeros(weight.shape[0], dtype=bias_dtype) if need_bias else None
    need = (need_x, need_bias, need_A, need_B, need_m)
    found = gradients_of((dy,), (x, bias, lora_A, lora_B, magnitude), need, formula)
    dx, dbias, dA, dB, dm = found
    return dx, None, dbias, dA, dB, dm, *(None,) * 6


class _DoRALinear(torch.autograd.Function):
    """``fastpeft::dora_linear`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, lora_A, lora_B, magnitude, _norm, scaling, dropout_p, seed, on_base, backend = inputs
        y, S, z, norm = _forward(*inputs)
        x, kept, keeps_z = _kept(ctx, x, bias, on_base, y, z)
        ctx.save_for_backward(x, kept, weight, lora_A, lora_B, magnitude, S, norm, seed)
        ctx.set_materialize_grads(False)
        bias_dtype = None if bias is None else bias.dtype
        ctx.options = (scaling, dropout_p, on_base, keeps_z, backend, bias_dtype)
        return y

    @staticmethod
    @differentiable(_by_reference)
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 12
        need_x, _weight, *of_parameters = ctx.needs_input_grad[:6]
        need = [need_x, *of_parameters]
        x, kept, weight, lora_A, lora_B, magnitude, S, norm, seed = ctx.saved_tensors
        tensors = (dy, x, kept, weight, lora_A, lora_B, magnitude, S, norm)
        scaling, p, on_base, keeps_z, backend, bias_dtype = ctx.options
        options = (seed, on_base, keeps_z, backend, need, bias_dtype)
        if runs_eagerly(dy):
            dx, dbias, dA, dB, dm = _gradients(*tensors, scaling, p, *options)
        else:  # an autograd that is traced
            found = iter(torch.ops.fastpeft.dora_linear_backward(*tensors, scaling, [p], None, *options))
            dx, dbias, dA, dB, dm = (next(found) if needed else None for needed in need)
        return dx, None, dbias, dA, dB, dm, *(None,) * 6
