"""One to three linears of one x through cuBLAS (hipBLAS): the vendor's GEMMs, then passes over their results.

    S    = all of drop_i(x) A_i^T                             stacked_down   one read of x, as in `stacked`
    y_i  = x W_i^T                                            torch.mm
    y_i  = c_i * (y_i + s_i S_i B_i^T) + bias_i               expand_scale_  one read and one write of y_i

    dx   = sum_i dY_i W_i                                     torch.mm, torch.addmm
    dx  += sum_i mask_i * (dS_i A_i) / (1 - p)                expand_add_    one read and one write of dx

The second sum is one product of the dS_i and the A_i side by side where there is no dropout, else a pass a
mask. It costs 2Y forward (y_i in and out again) and 2X backward, 2X more for each dY_i after the first, and
wins where the Triton GEMM is slower than the vendor's by more than that. DoRA's dx is not for it: c_i * dY_i
would have to be written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launch
from .expand import expand_add_, expand_scale_
from .projection import Projection


def expand_products(
    x: Tensor, projections: Sequence[Projection], S: Tensor, keep_z: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """`(ys, zs)` as `stacked_gemm.stacked_gemm` makes them, in x's dtype and contiguous; S [M, sum r]."""
    ys: list[Tensor] = []
    zs: list[Tensor | None] = []
    first = 0
    for p, keep in zip(projections, keep_z, strict=True):
        weight, z = p.weight.detach(), None
        if p.lora_B is None:
            y = F.linear(x.detach(), weight, None if p.bias is None else p.bias.detach().to(x.dtype))
        else:
            y = torch.mm(x.detach(), weight.t())
            z = launch.empty(tuple(y.shape), y.dtype, y) if keep else None
            part = S[:, first : first + p.lora_B.shape[1]]
            first += p.lora_B.shape[1]
            expand_scale_(y, part, p.lora_B, p.scaling, p.bias, p.magnitude, p.norm, z)
        ys.append(y)
        zs.append(z)
    return ys, zs


def expand_dx(
    dys: Sequence[Tensor],
    projections: Sequence[Projection],
    dSs: Sequence[Tensor | None],
    dropout_p: float,
    seeds: Sequence[Tensor | None],
) -> Tensor:
    """dx [M, K] in the dtype of the dY_i [M, N_i]; dS_i [M, r_i], None without an adapter.

    Raises:
        ValueError: a projection has a magnitude.
    """
    if any(p.magnitude is not None for p in projections):
        raise ValueError("dx through the vendor's GEMM is for LoRA: with DoRA, c * dY would be written")
    dx = torch.mm(dys[0], projections[0].weight)
    for dy, p in zip(dys[1:], projections[1:], strict=True):
        dx.addmm_(dy, p.weight)
    adapted = [
        (dS, p.lora_A, seed)
        for dS, p, seed in zip(dSs, projections, seeds, strict=True)
        if dS is not None and p.lora_A is not None
    ]
    if dropout_p > 0.0:
        for dS, lora_A, seed in adapted:
            expand_add_(dx, dS, lora_A, 1.0 / (1.0 - dropout_p), dropout_p, seed)
    elif len(adapted) == 1:
        expand_add_(dx, adapted[0][0], adapted[0][1], 1.0)
    elif adapted:
        expand_add_(
            dx, torch.cat([dS for dS, _, _ in adapted], 1), torch.cat([a for _, a, _ in adapted]), 1.0
        )
    return dx
