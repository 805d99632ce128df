"""LoRA on the weights of groups of tokens, as stacked experts have them: ``y_e = x_e W_e + s (x_e L_e) R_e``.

Backward, in each group, with ``S = x L``::

    dS = dy R^T      dx = dy W^T + s dS L^T      dL = s x^T dS      dR = s S^T dy

The products are torch's grouped GEMMs. Saved for backward: S [tokens, r] and references to x, W, L and R.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.eager import is_transformed
from fastpeft.ops.second_order import differentiable, gradients_of, saved_x

# Grouped GEMMs on a GPU want rows of whole 16 bytes.
RANK_MULTIPLE = 8


def grouped_lora(
    x: Tensor, weight: Tensor, left: Tensor, right: Tensor, offs: Tensor, *, scaling: float
) -> Tensor:
    """LoRA of the tokens of each group with the group's weight, as one differentiable op.

    Args:
        x: ``[tokens, in_features]``, the tokens of a group side by side.
        weight: ``[groups, in_features, out_features]``, x's dtype, frozen or not.
        left: ``[groups, in_features, r]``, x's dtype or fp32.
        right: ``[groups, r, out_features]``, likewise.
        offs: ``[groups]`` int32, where each group ends. What is beyond the last one is not computed.
        scaling: ``lora_alpha / r``.

    Returns:
        ``[tokens, out_features]`` in x's dtype.
    """
    if (weight.requires_grad and torch.is_grad_enabled()) or is_transformed():
        return _grouped_lora_reference(x, weight, left, right, offs, scaling)
    return _GroupedLoRA.apply(x, weight, left, right, offs, scaling)  # type: ignore[no-any-return, no-untyped-call]


def _grouped_lora_reference(
    x: Tensor, weight: Tensor, left: Tensor, right: Tensor, offs: Tensor, scaling: float
) -> Tensor:
    """The formula, for autograd and every transform to take apart."""
    left, right = _padded(left.to(x.dtype), right.to(x.dtype))
    update = _products(_products(x, left, offs), right, offs)
    return torch.add(_products(x, weight, offs), update, alpha=scaling)


def _products(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """Return each group's product; of a [., tokens] and b [tokens, .], [groups, ., .]."""
    return torch._grouped_mm(a, b, offs=offs)


def _padded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors with zeros up to a rank that a grouped GEMM takes."""
    more = -left.shape[-1] % RANK_MULTIPLE
    return (F.pad(left, (0, more)), F.pad(right, (0, 0, 0, more))) if more else (left, right)


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an operand of a rank-r product in the dtype to multiply in.

    On a CPU that is fp32: oneDNN makes code for every 16-bit product of another size, 0.3 ms, and experts
    have other numbers of tokens in every step.
    """
    return t.float() if t.is_cpu and dtype is not torch.float64 else t.to(dtype)


def _by_reference(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    x, weight, left, right, offs, _S = ctx.saved_tensors
    need_x, _, need_left, need_right, *_ = ctx.needs_input_grad
    x = saved_x(x, dy, weight.shape[1], (need_left, need_right))

    def formula(x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor]:
        return (_grouped_lora_reference(x, weight, left, right, offs, ctx.scaling),)

    need = (need_x, need_left, need_right)
    dx, d_left, d_right = gradients_of((dy,), (x, left, right), need, formula)
    return dx, None, d_left, d_right, None, None


class _GroupedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor, offs: Tensor, scaling: float
    ) -> Tensor:
        L, R = _padded(_operand(left, x.dtype), _operand(right, x.dtype))
        S = _products(_operand(x, x.dtype), L, offs)
        update = _products(S, R, offs)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, left, right, offs, S)
        ctx.set_materialize_grads(False)
        ctx.scaling = scaling
        return _products(x, weight, offs).add_(update, alpha=scaling)

    @staticmethod
    @differentiable(_by_reference)
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, weight, left, right, offs, S = ctx.saved_tensors
        need_x, _, need_left, need_right, *_ = ctx.needs_input_grad
        dy = dy.contiguous()
        rank_dy = _operand(dy, dy.dtype)
        r = left.shape[-1]
        L, R = _padded(_operand(left, dy.dtype), _operand(right, dy.dtype))
        dx = d_left = d_right = None
        if need_x or need_left:
            dS = _products(rank_dy, R.mT, offs)
        if need_x:
            update = _products(dS, L.mT, offs)
            dx = _products(dy, weight.mT, offs).add_(update, alpha=ctx.scaling)
        if need_left:
            d_left = _products(_operand(x, dy.dtype).t(), dS, offs)[..., :r].mul_(ctx.scaling).to(left.dtype)
        if need_right:
            d_right = _products(S.t(), rank_dy, offs)[:, :r].mul_(ctx.scaling).to(right.dtype)
        return dx, None, d_left, d_right, None, None
