"""DoRA's row norm ``n = ||W + s B A||_row`` from its factors, and the row scale ``c = m / n`` it gives.

::

    n^2 = ||W||^2 + rowsum(sB * (2 W A^T + sB (A A^T)))

so no [out_features, in_features] temporary is formed; ``||W||^2`` is computed once per weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops._common import accumulation_dtype, scaled_cast, without_autocast


def row_norm_squared(weight: Tensor) -> Tensor:
    """Return ``||W||^2`` per output row, [out_features] in fp32 (fp64), without an fp32 copy of W."""
    dtype = accumulation_dtype(weight.dtype)
    if torch.compiler.is_compiling() or weight.dtype == dtype:
        norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
        return norm.square()
    blocks = torch.split(weight, max(1, 2**22 // max(weight.shape[1], 1)))
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=dtype) for block in blocks]).square()


@without_autocast
def row_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    weight_norm_squared: Tensor,
    gram: Tensor | None = None,
) -> Tensor:
    """Return ``||W + s B A||`` per output row, [out_features] in fp32 (fp64).

    ``gram`` is ``A A^T`` [r, r] in that dtype, where the caller has it.
    """
    dtype = accumulation_dtype(weight.dtype)
    U = weight @ lora_A.to(weight.dtype).t()  # [out_features, r], the only product that reads W
    if gram is None:
        A = lora_A.to(dtype)
        gram = A @ A.t()
    sB = scaled_cast(lora_B, scaling, dtype)
    cross = torch.addmm(U.to(dtype), sB, gram, beta=2.0)
    return (weight_norm_squared + (sB * cross).sum(1)).clamp_(min=0.0).sqrt_()


def row_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return c [out_features] in the norm's dtype: m / n, and 0 for a zero row."""
    return torch.where(norm > 0, magnitude.to(norm.dtype) / norm, 0.0)
