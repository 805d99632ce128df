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

from fastpeft.ops.second_order import differentiable

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
    more = -left.shape[-1] % RANK_MULTIPLE
    if more:
        left, right = F.pad(left, (0, more)), F.pad(right, (0, 0, 0, more))
    if weight.requires_grad and torch.is_grad_enabled():
        update = _products(_products(x, left.to(x.dtype), offs), right.to(x.dtype), offs)
        return torch.add(_products(x, weight, offs), update, alpha=scaling)
    return _GroupedLoRA.apply(x, weight, left, right, offs, scaling)  # type: ignore[no-any-return, no-untyped-call]


def _products(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """Return each group's product; of a [., tokens] and b [tokens, .], [groups, ., .]."""
    return torch._grouped_mm(a, b, offs=offs)


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an operand of a rank-r product in the dtype to multiply in.

    On a CPU that is fp32: oneDNN makes code for every 16-bit product of another size, 0.3 ms, and experts
    have other numbers of tokens in every step.
    """
    return t.float() if t.is_cpu and dtype is not torch.float64 else t.to(dtype)


class _GroupedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, left: Tensor, right: Tensor, offs: Tensor, scaling: float
    ) -> Tensor:
        S = _products(_operand(x, x.dtype), _operand(left, x.dtype), offs)
        update = _products(S, _operand(right, x.dtype), offs)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, left, right, offs, S)
        ctx.set_materialize_grads(False)
        ctx.scaling = scaling
        return _products(x, weight, offs).add_(update, alpha=scaling)

    @staticmethod
    @differentiable()
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, weight, left, right, offs, S = ctx.saved_tensors
        need_x, _, need_left, need_right, *_ = ctx.needs_input_grad
        dy = dy.contiguous()
        rank_dy = _operand(dy, dy.dtype)
        dx = d_left = d_right = None
        if need_x or need_left:
            dS = _products(rank_dy, _operand(right, dy.dtype).mT, offs)
        if need_x:
            update = _products(dS, _operand(left, dy.dtype).mT, offs)
            dx = _products(dy, weight.mT, offs).add_(update, alpha=ctx.scaling)
        if need_left:
            d_left = _products(_operand(x, dy.dtype).t(), dS, offs).mul_(ctx.scaling).to(left.dtype)
        if need_right:
            d_right = _products(S.t(), rank_dy, offs).mul_(ctx.scaling).to(right.dtype)
        return dx, None, d_left, d_right, None, None
