"""One to three linears that read one x (q/k/v, gate and up), forward and backward, split at S.

For each projection i, with or without an adapter, LoRA (arXiv 2106.09685; c = 1) or DoRA (arXiv 2402.09353):

    S_i  = drop_i(x) A_i^T                                    stacked_down   one read of x, for all
    y_i  = c_i * (x W_i^T + s_i S_i B_i^T) + bias_i           stacked_gemm   one launch
    dS_i = s_i (c_i * dY_i) B_i, dB_i, dm_i, dbias_i          reduce_dy      one read of each dY_i
    dA_i = dS_i^T drop_i(x)                                   stacked_grad   one read of x, for all
    dx   = sum_i (c_i * dY_i) W_i + mask_i * (dS_i A_i)       stacked_dx     one launch, dx written once

Each projection has a mask of its own, as in a model that applies its adapters one by one. With dropout, the
row scale of DoRA stays on the undropped base product; PEFT's form of it is had from `dora` a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .check import check_backward, check_operands, check_row_scale
from .packed_mask import empty_mask, fill_mask
from .primitives import KeptProduct, RowScale
from .projection import Projection
from .reduce_dy import reduce_dy
from .stacked_down import stacked_down
from .stacked_dx import stacked_dx
from .stacked_expand import expand_dx, expand_products
from .stacked_gemm import stacked_gemm
from .stacked_grad import stacked_grad

MAX_PROJECTIONS = 3


class StackedGradients(NamedTuple):
    """Gradients of `stacked_forward`; lists have an entry a projection, None where it was not asked for."""

    dx: Tensor | None
    dA: list[Tensor | None]
    dB: list[Tensor | None]
    dm: list[Tensor | None]
    dbias: list[Tensor | None]


def rank_of(projection: Projection) -> int:
    """Columns that the projection has in S; 0 without an adapter."""
    return 0 if projection.lora_A is None else projection.lora_A.shape[0]


def row_scale_of(p: Projection) -> RowScale | None:
    """DoRA's row scale, whose c the first pass over dY fills for the input gradient; None in LoRA."""
    if p.magnitude is None or p.norm is None:
        return None
    c = launch.empty(tuple(p.norm.shape), torch.float32, p.norm)
    return RowScale(magnitude=p.magnitude, norm=p.norm, c=c)


def seed_list(seeds: Tensor | None, count: int, dropout_p: float) -> list[Tensor | None]:
    """One view of `seeds` [count] (int64) a projection; None without dropout."""
    if dropout_p == 0.0:
        return [None] * count
    if not isinstance(seeds, Tensor) or seeds.shape != (count,) or seeds.dtype != torch.int64:
        raise ValueError(f"dropout needs `seeds`, int64 [{count}], one a projection, on x's device")
    return [seeds[i : i + 1] for i in range(count)]


def check_projection(
    name: str, wide: Tensor, width: int, p: Projection, dropout_p: float, seed: Tensor | None
) -> None:
    """Refuse a projection that does not fit together, or not with `wide` [M, width]."""
    if (p.lora_A is None) != (p.lora_B is None) or (p.magnitude is None) != (p.norm is None):
        raise ValueError("a projection has lora_A and lora_B or neither, magnitude and norm or neither")
    if p.magnitude is not None and p.lora_A is None:
        raise ValueError("a projection with a magnitude has lora_A and lora_B")
    n, k = p.weight.shape
    none = p.weight.new_empty((0, 0), device="meta")
    lora_A = none.new_empty((0, k)) if p.lora_A is None else p.lora_A
    lora_B = none.new_empty((n, 0)) if p.lora_B is None else p.lora_B
    check_operands(name, wide, width, p.weight, lora_A, lora_B, dropout_p, seed)
    if p.bias is not None and p.bias.shape != (n,):
        raise ValueError(f"expected bias [{n}], got {list(p.bias.shape)}")
    if p.magnitude is not None and p.norm is not None:
        check_row_scale(p.weight, p.magnitude, p.norm)


def stacked_forward(
    x: Tensor,
    projections: Sequence[Projection],
    dropout_p: float = 0.0,
    seeds: Tensor | None = None,
    *,
    keep_z: Sequence[bool] | None = None,
    vendor_gemm: bool = False,
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """`y_i = c_i * (x W_i^T + s_i S_i B_i^T) + bias_i` with `S_i = drop_i(x) A_i^T`.

    Args:
        x: [M, K], fp32, fp16 or bf16, any strides.
        projections: one to three, all [N_i, K]; N, rank, bias, adapter or none, LoRA or DoRA may differ.
        dropout_p: probability of dropping an element of x in front of every A, in [0, 1).
        seeds: int64 [count] on x's device, one mask a projection; required when dropout_p > 0.
        keep_z: where z_i, the product before the row scale, is wanted too: dm of a projection with a bias.
        vendor_gemm: the products by the vendor's GEMM, each followed by one pass (`stacked_expand`).

    Returns: the y_i [M, N_i]; S [M, sum r], the columns of projection i after those of the ones before; and
    z_i [M, N_i] or None. All in x's dtype and contiguous.
    """
    count = len(projections)
    keep_z = [False] * count if keep_z is None else list(keep_z)
    if not 1 <= count <= MAX_PROJECTIONS or len(keep_z) != count:
        raise ValueError(
            f"expected 1 to {MAX_PROJECTIONS} projections and as many keep_z, got {count} and {len(keep_z)}"
        )
    masks = seed_list(seeds, count, dropout_p)
    for projection, seed in zip(projections, masks, strict=True):
        check_projection("x", x, projections[0].weight.shape[1], projection, dropout_p, seed)
    m, widths = x.shape[0], [p.weight.shape[0] for p in projections]
    if m == 0:
        ys = [x.new_empty((0, n)) for n in widths]
        zs = [x.new_empty((0, n)) if keep else None for n, keep in zip(widths, keep_z, strict=True)]
        return ys, x.new_empty((0, sum(map(rank_of, projections)))), zs
    with launch.on_device(x):
        S = down_all(x, projections, dropout_p, masks)
        ys, zs = (expand_products if vendor_gemm else stacked_gemm)(x, projections, S, keep_z)
    return ys, S, zs


def down_all(
    x: Tensor, projections: Sequence[Projection], dropout_p: float, masks: Sequence[Tensor | None]
) -> Tensor:
    """S [M, sum r] of all adapters; no launch where there is none."""
    adapted = [(p.lora_A, seed) for p, seed in zip(projections, masks, strict=True) if p.lora_A is not None]
    if not adapted:
        return x.new_empty((x.shape[0], 0))
    return stacked_down(x, [a for a, _ in adapted], dropout_p, [seed for _, seed in adapted])


def stacked_backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    projections: Sequence[Projection],
    S: Tensor,
    kept: Sequence[Tensor | None],
    kept_is_z: Sequence[bool],
    dropout_p: float = 0.0,
    seeds: Tensor | None = None,
    *,
    need_x: bool,
    need_A: Sequence[bool],
    need_B: Sequence[bool],
    need_m: Sequence[bool],
    need_bias: Sequence[bool],
    bias_dtypes: Sequence[torch.dtype | None] | None = None,
    vendor_gemm: bool = False,
) -> StackedGradients:
    """Gradients of `stacked_forward`; what is not asked for is None and costs nothing.

    Args:
        dys: [M, N_i] in the weights' dtype, any strides; None for an output that nothing depends on.
        x: [M, K] as in forward; None is fine when no dA is wanted.
        projections: as in forward, like dropout_p and seeds, which give the same masks again.
        S: [M, sum r] from forward.
        kept: y_i or z_i of forward where dm_i is wanted, else None.
        kept_is_z: which of the two; y_i only fits a projection without a bias.
        dropout_p: as in forward.
        seeds: as in forward.
        need_x: whether dx is wanted.
        need_A: whether dA_i is wanted; the other lists likewise.
        need_B: whether dB_i is wanted.
        need_m: whether dm_i is wanted.
        need_bias: whether dbias_i is wanted.
        bias_dtypes: dtypes of the dbias_i; dY's where None.
        vendor_gemm: dx by the vendor's GEMM and one pass or more over it (`stacked_expand`); not with DoRA.

    Returns: dx [M, K] in the dtype of the dY_i; the others in the dtypes of their parameters, from fp32 sums.
    Gradients of a projection whose dY_i is None are None, and dx is when all are.
    """
    count = len(projections)
    masks = seed_list(seeds, count, dropout_p)
    absent: list[Tensor | None] = [None] * count
    found = StackedGradients(None, absent, absent[:], absent[:], absent[:])
    live = [(i, dy, projections[i]) for i, dy in enumerate(dys) if dy is not None]
    offsets = list(accumulate(map(rank_of, projections), initial=0))
    dSs = absent[:]
    scales = [row_scale_of(p) for p in projections]
    for i, dy, p in live:
        check_projection("dy", dy, p.weight.shape[0], p, dropout_p, masks[i])
        check_backward(dy, x if need_A[i] else None, p.weight, S)
        dtype = None if bias_dtypes is None else bias_dtypes[i]
        with launch.on_device(dy):
            dSs[i], found.dB[i], found.dbias[i], found.dm[i] = projection_gradients(
                dy,
                p,
                S[:, offsets[i] : offsets[i + 1]],
                scales[i],
                KeptProduct(values=values, is_z=kept_is_z[i]) if (values := kept[i]) is not None else None,
                need_S=need_x or need_A[i],
                need_B=need_B[i],
                need_m=need_m[i],
                bias_dtype=(dtype or dy.dtype) if need_bias[i] else None,
            )
    if not live:
        return found
    dx, k = None, projections[0].weight.shape[1]
    packed = absent[:]
    with launch.on_device(live[0][1]):
        if need_x and dropout_p > 0.0 and not vendor_gemm:
            packed = [dS if dS is None else empty_mask(dS.shape[0], k, dS) for dS in dSs]
        wanted = [(i, p.lora_A, dS) for i, _, p in live if need_A[i] and (dS := dSs[i]) is not None]
        for i, dA in adapter_gradients(x, wanted, dropout_p, masks, packed):
            found.dA[i] = dA
        for mask, seed, known in zip(packed, masks, need_A, strict=True):
            if mask is not None and seed is not None and not known:
                fill_mask(mask, k, dropout_p, seed)
        places = [i for i, _, _ in live]
        of_live = [dy for _, dy, _ in live], [p for _, _, p in live], [dSs[i] for i in places]
        if need_x and live[0][1].shape[0] == 0:
            dx = live[0][1].new_empty((0, k))
        elif need_x and vendor_gemm:
            dx = expand_dx(*of_live, dropout_p, [masks[i] for i in places])
        elif need_x:
            cs = [None if scale is None else scale.c for scale in (scales[i] for i in places)]
            dx = stacked_dx(*of_live, cs, [packed[i] for i in places], 1.0 / (1.0 - dropout_p))
    return found._replace(dx=dx)


def projection_gradients(
    dy: Tensor,
    p: Projection,
    S: Tensor,
    row_scale: RowScale | None,
    kept: KeptProduct | None,
    *,
    need_S: bool,
    need_B: bool,
    need_m: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`(dS, dB, dbias, dm)` of one projection: what is had from dY alone. S [M, r] is its part of S."""
    if need_m and (kept is None or kept.values.shape != dy.shape):
        raise ValueError(f"dm needs kept {list(dy.shape)}, got {kept and list(kept.values.shape)}")
    if p.lora_B is None:
        dbias = None if bias_dtype is None else dy.sum(0, dtype=torch.float32).to(bias_dtype)
        return None, None, dbias, None
    if dy.shape[0] == 0:
        return (
            dy.new_empty((0, p.lora_B.shape[1])) if need_S else None,
            p.lora_B.new_zeros(p.lora_B.shape) if need_B else None,
            None if bias_dtype is None else dy.new_zeros((dy.shape[1],), dtype=bias_dtype),
            p.magnitude.new_zeros(p.magnitude.shape) if need_m and p.magnitude is not None else None,
        )
    return reduce_dy(
        dy,
        p.lora_B,
        S,
        float(p.scaling),
        need_S=need_S,
        need_B=need_B,
        bias_dtype=bias_dtype,
        row_scale=row_scale,
        kept=kept if need_m else None,
    )


def adapter_gradients(
    x: Tensor | None,
    wanted: Sequence[tuple[int, Tensor | None, Tensor]],
    dropout_p: float,
    masks: Sequence[Tensor | None],
    packed: Sequence[Tensor | None],
) -> list[tuple[int, Tensor]]:
    """`(i, dA_i)` for each wanted `(i, A_i, dS_i)`, from one read of x; fills their entries of `packed`."""
    if not wanted:
        return []
    if x is None:
        raise ValueError("dA needs x")
    indices, dSs = [i for i, _, _ in wanted], [dS for _, _, dS in wanted]
    dtypes = [x.dtype if a is None else a.dtype for _, a, _ in wanted]
    if x.shape[0] == 0:
        return [
            (i, x.new_zeros((dS.shape[1], x.shape[1]), dtype=d))
            for (i, _, dS), d in zip(wanted, dtypes, strict=True)
        ]
    seeds, filled = [masks[i] for i in indices], [packed[i] for i in indices]
    return list(zip(indices, stacked_grad(x, dSs, dtypes, dropout_p, seeds, packed=filled), strict=True))
