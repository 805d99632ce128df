"""A product with a weight of three axes by a Function of a module's own."""

from __future__ import annotations

import torch


class OwnProduct(torch.autograd.Function):
    """A product as kernels of the module's own compute it, with the weight's gradient as a whole."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.einsum("ri,eoi->ro", x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = torch.einsum("ro,eoi->ri", dy, weight) if ctx.needs_input_grad[0] else None
        whole = (dy.T @ x).expand(weight.shape) if ctx.needs_input_grad[1] else None
        return dx, whole
