"""DoRA's row norm ``n = ||W + s B A||_row`` from its factors, and the row scale ``c = m / n`` it gives.

::

    n^2 = ||W||^2 + rowsum(sB * (2 W A^T + sB (A A^T)))

so no [out_features, in_features] temporary is formed; ``||W||^2`` is computed once per weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastpeft.ops import blocked
from fastpeft.ops._common import accumulation_dtype, cast, scaled_cast, without_autocast
from fastpeft.ops.cpu_gemm import products_in_fp32
from fastpeft.ops.eager import runs_eagerly
from fastpeft.ops.features import NEAR
from fastpeft.ops.products import RowScale

# The smallest |c|. A row whose magnitude is 0 (or nearly) is scaled by this instead, so that its output, of
# the order of 1e-30, still tells z, of which the magnitude's gradient is made: bf16 and fp32 hold it in full.
MIN_ROW_SCALE = 2.0**-100
# From which W A^T is worth a cast of W, on a CPU that multiplies fp32 faster. bf16 took of fp32's time, cast
# included, on one without bf16 arithmetic, W 4096 x 4096: rank 1 0.7, 4 1.5, 8 2.3, 16 4.6, 64 6.1 times.
MIN_RANK = 8


def row_norm_squared(weight: Tensor) -> Tensor:
    """Return ``||W||^2`` per output row, [out_features] in fp32 (fp64), without an fp32 copy of W."""
    dtype = accumulation_dtype(weight.dtype)
    if torch.compiler.is_compiling() or weight.dtype == dtype or weight.is_meta:
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
) -> Tensor:
    """Return ``||W + s B A||`` per output row, [out_features] in fp32 (fp64)."""
    dtype = accumulation_dtype(weight.dtype)
    if _casts(weight, lora_A):
        U = blocked.weight_product(weight, lora_A)
    else:
        U = weight @ lora_A.to(weight.dtype).t()  # [out_features, r], the only product that reads W
    A = lora_A.to(dtype)
    sB = scaled_cast(lora_B, scaling, dtype)
    cross = torch.addmm(U.to(dtype), sB, A @ A.t(), beta=2.0)
    return (weight_norm_squared + (sB * cross).sum(1)).clamp_(min=0.0).sqrt_()


def _casts(weight: Tensor, lora_A: Tensor) -> bool:
    """Whether to take W A^T in fp32 blocks: tensors of other types than these are not to be cut."""
    plain = type(weight) in (Tensor, nn.Parameter, FakeTensor)
    return plain and lora_A.shape[0] >= MIN_RANK and runs_eagerly(weight) and products_in_fp32(weight)


def row_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return c = m / n [out_features] in n's dtype: 0 for a zero row, else at least MIN_ROW_SCALE in size."""
    return checked_row_scale(magnitude, norm).c


def checked_row_scale(magnitude: Tensor, norm: Tensor) -> RowScale:
    """:func:`row_scale`, and what is known of it without waiting for a device."""
    c = cast(magnitude, norm.dtype) / norm
    # Not where it is compiled: embeddings and a second DoRA take their scale outside the op.
    if c.is_cpu and c.numel() and not torch.compiler.is_compiling():
        least, most = (bound.item() for bound in c.aminmax())
        if least >= MIN_ROW_SCALE and most < math.inf:  # false for NaN too
            return RowScale(c, True, least == most == 1.0, least >= 1.0 - NEAR and most <= 1.0 + NEAR)
        smallest, largest = (bound.item() for bound in c.abs().aminmax())  # a negative m is as good
        if smallest >= MIN_ROW_SCALE and largest < math.inf:
            return RowScale(c, is_quotient=True)
    floor = torch.where(magnitude < 0, -MIN_ROW_SCALE, MIN_ROW_SCALE).to(c.dtype)
    c = torch.where(c.abs() < MIN_ROW_SCALE, floor, c)
    return RowScale(torch.where(norm > 0, c, 0.0))


def magnitude_gradient(
    dot: Tensor, scale: RowScale, magnitude: Tensor, norm: Tensor, *, kept_is_z: bool
) -> Tensor:
    """Return dm [out_features] in m's dtype; ``dot`` is colsum(dY * z), or colsum(dY * y) without a bias."""
    m = cast(magnitude, norm.dtype)
    if scale.is_quotient:
        return cast(dot / (norm if kept_is_z else m), magnitude.dtype)
    # y / c is y n / m where c is the quotient: the bits of is_quotient, beside a row that is guarded.
    divisor = norm if kept_is_z else torch.where(scale.c == m / norm, m, scale.c * norm)
    return torch.where(norm > 0, dot / divisor, 0.0).to(magnitude.dtype)
