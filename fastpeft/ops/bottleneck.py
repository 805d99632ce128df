"""A bottleneck on a layer's output: ``y = base + s (act(x D^T + d) U^T + u)``.

With ``x = base`` it is the series adapter (Houlsby et al. 2019, arXiv 1902.00751), with x the layer's input
the parallel one (He et al. 2022, arXiv 2110.04366). Down-projection, non-linearity, up-projection and
residual are one op: the update is added in the pass of its product, in series the residual's gradient too.

Backward, with ``h = x D^T + d`` and ``a = act(h)``::

    da = s dY U      dh = da * act'(h)      dU = s dY^T a      du = s colsum(dY)
    dD = dh^T x      dd = colsum(dh)        dx = dh D          dbase = dY  (+ dx in series)

On a GPU the up-projection, its backward and the residual in series are Triton kernels that read and write
base and dY once (:mod:`fastpeft_kernels.bottleneck`); what has the bottleneck's width is ATen's there too.

Saved for backward: references to ``x`` (only where D trains), D and U, and one tensor of ``[tokens, size]``:
``a`` for relu and tanh, whose derivative shows in it, else ``h``. Parameters in fp32 over a 16-bit base are
rounded to its dtype for the products, as LoRA's are; their gradients come back in their own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import backend as backends
from fastpeft.choice import choice_key, choose
from fastpeft.errors import ShapeError
from fastpeft.ops import kernel_paths
from fastpeft.ops._common import flatten_tokens, scaled_cast, unflatten_tokens, without_autocast
from fastpeft.ops.eager import is_transformed, runs_eagerly
from fastpeft.ops.features import feature_sum
from fastpeft.ops.second_order import differentiable

NonLinearity = Literal["relu", "tanh", "gelu", "gelu_tanh", "silu"]
_aten = torch.ops.aten
_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
}
# The product of a gradient with the derivative, from what is kept: a for the first two, h for the others.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda da, a: _aten.threshold_backward(da, a, 0),
    "tanh": lambda da, a: _aten.tanh_backward(da, a),
    "gelu": lambda da, h: _aten.gelu_backward(da, h),
    "gelu_tanh": lambda da, h: _aten.gelu_backward(da, h, approximate="tanh"),
    "silu": lambda da, h: _aten.silu_backward(da, h),
}
_KEEPS_A = ("relu", "tanh")


def bottleneck_reference(
    base: Tensor,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    non_linearity: str,
    scaling: float,
) -> Tensor:
    """The formula, line for line, in whatever dtype it is given."""
    return base + scaling * F.linear(_FORWARD[non_linearity](F.linear(x, down, down_bias)), up, up_bias)


def bottleneck(
    base: Tensor,
    x: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    *,
    non_linearity: NonLinearity,
    scaling: float,
) -> Tensor:
    """A bottleneck adapter's result as one differentiable op.

    Args:
        base: ``[..., out_features]``, the layer's output.
        x: ``[..., in_features]``, the layer's input (parallel), in base's dtype or, under autocast, another;
            None for the output again (series).
        down: ``[size, in_features]``, base's dtype or fp32.
        down_bias: ``[size]``, down's dtype.
        up: ``[out_features, size]``, likewise.
        up_bias: ``[out_features]``, up's dtype.
        non_linearity: a name of :data:`NonLinearity`.
        scaling: the factor on what is added.

    Returns:
        ``[..., out_features]`` in base's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit together.
        BackendError: the backend chosen with :func:`fastpeft.set_backend` cannot run here.
    """
    if x is not None and x.dtype != base.dtype:
        x = x.to(base.dtype)
    _check(base, base if x is None else x, down, down_bias, up, up_bias)
    if is_transformed():
        D, d, U, u = (tensor.to(base.dtype) for tensor in (down, down_bias, up, up_bias))
        return bottleneck_reference(base, base if x is None else x, D, d, U, u, non_linearity, scaling)
    backend = backends.resolve(base, op="bottleneck")
    inputs = (base, x, down, down_bias, up, up_bias, non_linearity, scaling, backend)
    if runs_eagerly(base):
        return _Bottleneck.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    y, _ = torch.ops.fastpeft.bottleneck(*inputs)
    return y  # type: ignore[no-any-return]


def _check(base: Tensor, x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> None:
    size = down.shape[0]
    expected = [[size, x.shape[-1]], [size], [base.shape[-1], size], [base.shape[-1]]]
    found = [list(tensor.shape) for tensor in (down, down_bias, up, up_bias)]
    if expected != found or x.shape[:-1] != base.shape[:-1]:
        raise ShapeError(
            "bottleneck: expected x with base's leading sizes, down [size, in_features], down_bias [size], "
            f"up [out_features, size] and up_bias [out_features], got x {list(x.shape)}, base "
            f"{list(base.shape)} and {', '.join(map(str, found))}"
        )
    if down.dtype != down_bias.dtype or up.dtype != up_bias.dtype:
        raise ShapeError(
            f"bottleneck: expected biases in their matrices' dtypes, got {down_bias.dtype} for {down.dtype} "
            f"and {up_bias.dtype} for {up.dtype}"
        )
    if len({tensor.device for tensor in (base, x, down, up)}) > 1:
        raise ShapeError(f"bottleneck: expected all tensors on one device, got {base.device}, {down.device}")


@without_autocast
def _forward(
    base: Tensor,
    x: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    non_linearity: str,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return y [..., out_features] and what is kept, [tokens, size]."""
    dtype = base.dtype
    result = flatten_tokens(base)
    tokens = result if x is None else flatten_tokens(x)
    h = torch.addmm(down_bias.to(dtype), tokens, down.to(dtype).t())
    a = _FORWARD[non_linearity](h)
    if backend == "triton" and len(result):
        arguments = (result, a, up, up_bias, scaling)
        paths: dict[str, Callable[[], Tensor]] = {
            "split": partial(kernel_paths.kernels().bottleneck_up, *arguments),
            "aten": partial(_up, *arguments),
        }
        key = choice_key(len(result), up.shape[0], up.shape[1], up.shape[1], dtype)
        y = paths[choose("bottleneck_up", paths, key=key, device=base.device)]()
    else:
        y = _up(result, a, up, up_bias, scaling)
    return unflatten_tokens(y, base), a if non_linearity in _KEEPS_A else h


def _up(base: Tensor, a: Tensor, up: Tensor, up_bias: Tensor, scaling: float) -> Tensor:
    y = torch.addmm(base, a, up.to(base.dtype).t(), alpha=scaling)
    return y.add_(scaled_cast(up_bias, scaling, base.dtype))


@without_autocast
def _gradients(
    dy: Tensor,
    x: Tensor | None,
    down: Tensor,
    up: Tensor,
    kept: Tensor,
    non_linearity: str,
    scaling: float,
    in_series: bool,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    """Return the gradients that ``need`` asks for, of (x, down, down_bias, up, up_bias), in that order.

    x's is in series the residual's too.
    """
    need_x, need_down, need_down_bias, need_up, need_up_bias = need
    gradient = flatten_tokens(dy)
    results: dict[int, Tensor] = {}
    need_a = need_x or need_down or need_down_bias
    a = kept
    if non_linearity not in _KEEPS_A and (need_up or backend == "triton"):
        a = _FORWARD[non_linearity](kept)
    of_up = kernel_paths.kernels().bottleneck_up_backward if backend == "triton" else _up_gradients
    da, dup, dup_bias = of_up(
        gradient, a, up, scaling, need_a=need_a, need_up=need_up, need_up_bias=need_up_bias
    )
    if dup is not None:
        results[3] = dup
    if dup_bias is not None:
        results[4] = dup_bias
    if da is not None:
        dh = _BACKWARD[non_linearity](da, kept)
        if need_x:
            if in_series and backend == "triton" and len(gradient):
                dx = kernel_paths.kernels().expand_add(gradient.contiguous(), dh, down, 1.0)
            else:
                D = down.to(dy.dtype)
                dx = torch.addmm(gradient, dh, D) if in_series else dh @ D
            results[0] = unflatten_tokens(dx, dy)
        if need_down:
            assert x is not None
            results[1] = (dh.t() @ flatten_tokens(x)).to(down.dtype)
        if need_down_bias:
            results[2] = feature_sum(dh).to(down.dtype)
    return [results[place] for place in sorted(results)]


def _up_gradients(
    dy: Tensor, a: Tensor, up: Tensor, scaling: float, *, need_a: bool, need_up: bool, need_up_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of (a, up, up_bias)."""
    return (
        dy @ scaled_cast(up, scaling, dy.dtype) if need_a else None,
        scaled_cast(dy.t() @ a, scaling, up.dtype) if need_up else None,
        scaled_cast(feature_sum(dy), scaling, up.dtype) if need_up_bias else None,
    )


_bottleneck = torch.library.custom_op("fastpeft::bottleneck", _forward, mutates_args=())
_bottleneck_backward = torch.library.custom_op("fastpeft::bottleneck_backward", _gradients, mutates_args=())


@_bottleneck.register_fake
def _(
    base: Tensor,
    x: Tensor | None,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    non_linearity: str,
    scaling: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tokens = math.prod(base.shape[:-1])
    return torch.empty_like(base, memory_format=torch.contiguous_format), base.new_empty(
        tokens, down.shape[0]
    )


@_bottleneck_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    down: Tensor,
    up: Tensor,
    kept: Tensor,
    non_linearity: str,
    scaling: float,
    in_series: bool,
    backend: str,
    need: list[bool],
) -> list[Tensor]:
    shapes = ((*dy.shape[:-1], down.shape[1]), down.shape, down.shape[:1], up.shape, up.shape[:1])
    kinds = (dy.dtype, down.dtype, down.dtype, up.dtype, up.dtype)
    return [
        dy.new_empty(shape, dtype=dtype)
        for shape, dtype, needed in zip(shapes, kinds, need, strict=True)
        if needed
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], kept: Tensor) -> None:
    base, x, down, _, up, _, non_linearity, scaling, backend = inputs
    source = base if x is None else x
    ctx.save_for_backward(source if ctx.needs_input_grad[2] else None, down, up, kept)
    ctx.set_materialize_grads(False)
    ctx.options = (non_linearity, scaling, x is None, backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor | None, _kept: None = None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    base_grad, x_grad, *parameters = ctx.needs_input_grad[:6]
    x, down, up, kept = ctx.saved_tensors
    non_linearity, scaling, in_series, backend = ctx.options
    need = [base_grad if in_series else x_grad, *parameters]
    gradients_of = _gradients if runs_eagerly(dy) else torch.ops.fastpeft.bottleneck_backward
    options = (non_linearity, scaling, in_series, backend, need)
    found = iter(gradients_of(dy, x, down, up, kept, *options))
    dx, *others = (next(found) if needed else None for needed in need)
    dbase, dx = (dx, None) if in_series else (dy, dx)
    return (dbase if base_grad else None, dx, *others, None, None, None)


_bottleneck.register_autograd(_backward, setup_context=_setup_context)


class _Bottleneck(torch.autograd.Function):
    """``fastpeft::bottleneck`` without ``torch.library``'s dispatch (:mod:`fastpeft.ops.eager`)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, kept = _forward(*inputs)
        _save(ctx, inputs, kept)
        return y

    @staticmethod
    @differentiable()
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dy)
