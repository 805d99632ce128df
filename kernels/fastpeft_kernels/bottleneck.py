"""A bottleneck on a layer's output, `y = base + s (a U^T + u)` with `a = act(x D^T + d)`: what is wide of it.

    y  = base + s a U^T + s u                       expand_add   one read of base, one write of y
    da = s dY U,  dU = s dY^T a,  colsum(dY)        reduce_dy    one read of dY, or two of a wide one
    dx = dY + dh D     (in series)                  expand_add   one read of dY, one write of dx

Houlsby et al. 2019, arXiv 1902.00751; He et al. 2022, arXiv 2110.04366. What has the bottleneck's width, and
the two products that only read x, have nothing to fuse and are the caller's, by ATen: in ATen the three lines
above read and write base or dY twice as often.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .expand import expand_add
from .reduce_dy import reduce_dy


def bottleneck_up(base: Tensor, a: Tensor, up: Tensor, up_bias: Tensor, scaling: float) -> Tensor:
    """`base + scaling * (a up^T + up_bias)`, summed in fp32.

    Args:
        base: [M, N], fp32, fp16 or bf16; copied first if it is not contiguous.
        a: [M, size] in base's dtype.
        up: [N, size], in base's dtype or fp32; converted in registers.
        up_bias: [N] of any floating dtype.
        scaling: a run-time number.

    Returns: a new [M, N] tensor in base's dtype.
    """
    bias = up_bias if scaling == 1.0 else up_bias.float() * scaling
    return expand_add(base.contiguous(), a, up.t(), scaling, bias)


def bottleneck_up_backward(
    dy: Tensor, a: Tensor, up: Tensor, scaling: float, *, need_a: bool, need_up: bool, need_up_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients `(da, dup, dup_bias)` of `bottleneck_up`; what is not asked for is None.

    Args:
        dy: [M, N], any strides.
        a: as in forward.
        up: as in forward.
        scaling: as in forward.
        need_a: whether da is wanted; the other flags likewise.
        need_up: whether dup is wanted.
        need_up_bias: whether dup_bias is wanted.

    Returns: da [M, size] in dy's dtype; dup and dup_bias in up's, rounded once, from fp32 sums.
    """
    if not dy.shape[0]:
        return (
            torch.zeros_like(a) if need_a else None,
            torch.zeros_like(up) if need_up else None,
            up.new_zeros(up.shape[0]) if need_up_bias else None,
        )
    with launch.on_device(dy):
        sums = torch.float32 if need_up_bias else None
        da, dup, total, _ = reduce_dy(
            dy, up, a, float(scaling), need_S=need_a, need_B=need_up, bias_dtype=sums
        )
    return da, dup, None if total is None else (total * scaling).to(up.dtype)
