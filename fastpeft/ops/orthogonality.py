"""How far matrices are from orthonormal rows: AdaLoRA's regulariser (Zhang et al. 2023, arXiv 2303.10512).

    R(P_1 .. P_n) = 1/n * sum_i || P_i P_i^T - I ||_F

The paper sums the squares of the norms; this is PEFT's form, the mean of the norms themselves. Only the
``[r, r]`` Gram matrices are ever formed. Saved for backward: references to the matrices, and one
``[n, r, r]`` tensor of ``(P_i P_i^T - I) / ||..||``, from which each gradient is one product::

    dP_i = 2/n * (P_i P_i^T - I) / || P_i P_i^T - I ||_F  P_i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.ops._common import without_autocast
from fastpeft.ops.eager import is_transformed


def orthogonality_reference(matrices: Sequence[Tensor]) -> Tensor:
    """The formula, line for line, in whatever dtype it is given."""
    norms = [torch.linalg.matrix_norm(P @ P.T - torch.eye(len(P)).to(P)) for P in matrices]
    return torch.stack(norms).mean()


class _Orthogonality(torch.autograd.Function):
    """The sum of the norms of matrices of one rank."""

    @staticmethod
    def forward(ctx: Any, *matrices: Tensor) -> Tensor:
        total, residuals = _norms(*matrices)
        ctx.save_for_backward(residuals, *matrices)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        residuals, *matrices = ctx.saved_tensors
        return _gradients(residuals, gradient, matrices, ctx.needs_input_grad)


@without_autocast
def _norms(*matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the norms, and the unit matrices [n, r, r] in the direction of each residual."""
    residuals = torch.stack([P @ P.t() for P in matrices])
    residuals.diagonal(dim1=1, dim2=2).sub_(1.0)
    norms = torch.linalg.vector_norm(residuals, dim=(1, 2), keepdim=True)
    # A norm of 0 has the subgradient 0, as torch's.
    return norms.sum(), residuals.div_(torch.where(norms > 0, norms, 1.0))


@without_autocast
def _gradients(
    residuals: Tensor, gradient: Tensor, matrices: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    factors = (residuals * (2.0 * gradient)).unbind()
    return tuple(
        factor @ P if need else None for factor, P, need in zip(factors, matrices, needed, strict=True)
    )


def orthogonality(matrices: Sequence[Tensor]) -> Tensor:
    """R of the module's docstring, a scalar on the first matrix's device.

    Args:
        matrices: at least one, each ``[r, features]`` with any strides (``lora_B`` transposed, say), fp32 or
            fp64; their ranks and devices may differ.
    """
    if is_transformed():
        return orthogonality_reference(matrices)
    groups: dict[Any, list[Tensor]] = {}
    for P in matrices:
        groups.setdefault((P.shape[0], P.device, P.dtype), []).append(P)
    device = matrices[0].device
    totals = [_Orthogonality.apply(*members).to(device) for members in groups.values()]  # type: ignore[no-untyped-call]
    return torch.stack(totals).sum() / len(matrices)
