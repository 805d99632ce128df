"""How an adapter's A [r, in_features] and B [out_features, r] start, by PEFT's names.

    True           A Kaiming-uniform, B = 0                                        arXiv 2106.09685
    "gaussian"     A normal with variance 1/r^2, B = 0
    False          A and B Kaiming-uniform
    "orthogonal"   A = Q_odd^T R_1 / 10, B = R_2 Q_even / 10: rows of one orthogonal Q, so B A = 0
    "pissa"        W = U S V^T,   A = (S_r / s)^1/2 V_r^T,   B = U_r (S_r / s)^1/2     arXiv 2404.02948
    "pissa_niter_N"   the same from a randomised SVD of N power iterations
    "olora"        W = Q R,   A = R_r,   B = Q_r                                   arXiv 2406.01775

with s the adapter's scaling and ``_r`` the first r. The last three leave ``W - s B A`` in the place of W, so
that a model starts as its base: what trains are W's principal parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastpeft.errors import PatchError
from fastpeft.ops._common import accumulation_dtype

Factors = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


def initialise(lora_A: Tensor, lora_B: Tensor, weight: Tensor, how: bool | str, scaling: float) -> None:
    """Fill A and B.

    Args:
        lora_A: [r, in_features], empty.
        lora_B: [out_features, r], zero.
        weight: the base's, [out_features, in_features]; it is read, not written.
        how: a value of ``LoRA.init_lora_weights``.
        scaling: the adapter's.

    Raises:
        PatchError: the weight has no such factors: its rank is too low, or it is not finite.
    """
    if (factors := base_factors(how)) is not None:
        A, B = _factors(weight, lora_A.shape[0], scaling, factors)
    elif how == "orthogonal":
        A, B = _orthogonal(lora_A.shape[0], *reversed(weight.shape))
    else:
        _random(lora_A, lora_B, how)
        return
    lora_A.copy_(A)
    lora_B.copy_(B)


def base_factors(how: bool | str) -> Factors | None:
    """Return what gives A and B from a weight [out_features, in_features], None where that plays no part."""
    if how == "olora":
        return _olora
    if how == "pissa":
        return _pissa
    if isinstance(how, str) and how.startswith("pissa_niter_"):
        iterations = int(how.removeprefix("pissa_niter_"))
        return lambda weight, r, scaling: _fast_pissa(weight, r, scaling, iterations)
    return None


def _factors(weight: Tensor, r: int, scaling: float, factors: Factors) -> tuple[Tensor, Tensor]:
    if r > min(weight.shape):
        raise PatchError(f"expected a rank of at most {min(weight.shape)}, its weight's own, got r={r}")
    if weight.is_meta:
        raise PatchError("its weight is on the meta device, and the initialisation starts from its values")
    numbers = weight.detach().to(accumulation_dtype(weight.dtype))
    if not torch.isfinite(numbers).all():
        raise PatchError("its weight is not finite, so it has no principal part to start from")
    try:
        return factors(numbers, r, scaling)
    except RuntimeError as error:  # torch's LinAlgError is one
        raise PatchError(f"its weight could not be decomposed: {error}") from None


def _random(lora_A: Tensor, lora_B: Tensor, how: bool | str) -> None:
    if how == "gaussian":
        nn.init.normal_(lora_A, std=1.0 / lora_A.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))


def _orthogonal(r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Drawn in PEFT's order, so that a seed gives PEFT's numbers."""
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = torch.randn(in_features, r // 2).mm(Q[0::2]).t() / 10.0
    B = torch.randn(r // 2, out_features).t().mm(Q[1::2]) / 10.0
    return A, B


def _pissa(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return _balanced(U[:, :r], S[:r], Vh[:r], scaling)


def _fast_pissa(weight: Tensor, r: int, scaling: float, iterations: int) -> tuple[Tensor, Tensor]:
    U, S, V = torch.svd_lowrank(weight, r, niter=iterations)
    return _balanced(U, S, V.t(), scaling)


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root


def _olora(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]
