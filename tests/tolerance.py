"""The one tolerance rule: against fp64, at most twice the error of plain PyTorch in the same dtype.

The error is the relative Frobenius norm of the difference. "Plain PyTorch" is the textbook formula in ATen
calls with every operand cast to the dtype under test. So no tolerance is ever chosen by hand: a dtype, a
shape or a formula that is hard for PyTorch is allowed to be as hard for us, and no harder than twice that.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How much worse than plain PyTorch a result may be.
FACTOR = 2.0

# Plain PyTorch can be exact (a sum of one term); then the rule would ask for exactness. The floor is used
# in that case only, and is four units in the last place of fp32, the type every kernel accumulates in.
EXACT_FLOOR = 4 * torch.finfo(torch.float32).eps


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """`|actual - reference| / |reference|` in fp64; plain `|actual|` where the reference is all zeros."""
    difference = (actual.detach().double() - reference.double()).norm().item()
    size = reference.double().norm().item()
    return difference / size if size else difference


def assert_within_rule(actual: Tensor, reference_fp64: Tensor, plain_same_dtype: Tensor, what: str) -> None:
    """Fail unless `actual` is as close to the fp64 reference as the rule asks; name `what` was compared."""
    assert actual.shape == reference_fp64.shape, (
        f"{what}: expected shape {list(reference_fp64.shape)}, got {list(actual.shape)}"
    )
    assert torch.isfinite(actual).all(), (
        f"{what}: {int((~torch.isfinite(actual)).sum())} elements are not finite"
    )
    error = relative_error(actual, reference_fp64)
    plain = relative_error(plain_same_dtype, reference_fp64)
    limit = FACTOR * plain if plain else EXACT_FLOOR
    if not reference_fp64.any():
        limit = 0.0
    assert error <= limit, f"{what}: relative error {error:.3e}, plain PyTorch {plain:.3e}, limit {limit:.3e}"
