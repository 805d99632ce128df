"""`dA_i = dS_i^T drop_i(x) / (1 - p)` for one to three projections of one x: one read of x for all.

x may also be a gate's output, `x = act(g) * u`, made again in registers: what a fused MLP needs for dA of its
down projection, without having kept h.

The sum runs over all M tokens while a result is only [r, C]: the token loop is split over programs, and the
last one of a tile adds their fp32 partials in order, as in `grad_a`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .activation import activate
from .dropout import draw_mask, interleave, pack_mask
from .finish import is_last, sum_partials
from .kernel_names import STACKED_GRAD


@triton.jit(do_not_specialize=["M", "tiles_per_split"])  # type: ignore[untyped-decorator]
def stacked_grad_kernel(
    p_x: tl.tensor,
    p_u: tl.tensor,
    p_ds: tl.tensor,
    p_da: tl.tensor,
    p_partial: tl.tensor,
    p_counter: tl.tensor,
    p_seed: tl.tensor,
    p_packed: tl.tensor,
    M: tl.tensor,
    C: tl.tensor,
    R: tl.tensor,
    stride_xm: tl.tensor,
    stride_xc: tl.tensor,
    stride_um: tl.tensor,
    stride_uc: tl.tensor,
    stride_sm: tl.tensor,
    offset_r: tl.tensor,
    stride_partial: tl.tensor,
    tiles_per_split: tl.tensor,
    keep_scale: tl.tensor,
    dropout_p: tl.tensor,
    COUNT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Program (tile of C, tile of every R, split of M); dA_i [r_i, C], partial [splits, sum r, C].

    The accumulators are [BLOCK_N, BLOCK_R], columns first: a tensor core wants at least 64 rows on the M side
    of its product and is content with 16 on the other, and r is the small one.
    """
    i_c = tl.program_id(0)
    i_r = tl.program_id(1)
    i_split = tl.program_id(2)
    o_c = (i_c * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_c = o_c < C

    b_accs = (tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32),) * COUNT
    first = i_split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(M, BLOCK_M))
    for i_m in range(first, last):
        o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_m = o_m < M
        m_x = m_m[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_xm + o_c[None, :] * stride_xc, mask=m_x, other=0.0)
        if ACTIVATION is not None:
            b_u = tl.load(p_u + o_m[:, None] * stride_um + o_c[None, :] * stride_uc, mask=m_x, other=0.0)
            b_x = (activate(b_x.to(tl.float32), ACTIVATION) * b_u.to(tl.float32)).to(b_u.dtype)
        b_sums = ()
        for i in tl.static_range(COUNT):
            b_ds = tl.load(
                p_ds[i] + o_m[:, None] * stride_sm[i] + o_r[None, :],
                mask=m_m[:, None] & (o_r < R[i])[None, :],
                other=0.0,
            )
            b_dropped = b_x
            if HAS_DROPOUT:
                b_0, b_1, b_2, b_3 = draw_mask(p_seed[i], dropout_p, o_m, i_c * BLOCK_N, C, BLOCK_N)
                if p_packed[i] is not None:
                    n_group = tl.cdiv(C, 4)
                    o_group = (i_c * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)).to(tl.int64)
                    m_group = m_m[:, None] & (o_group < n_group)[None, :] & (i_r == 0)
                    p_tile = p_packed[i] + o_m[:, None] * n_group + o_group[None, :]
                    tl.store(p_tile, pack_mask(b_0, b_1, b_2, b_3), mask=m_group)
                b_dropped = tl.where(interleave(b_0, b_1, b_2, b_3), b_x, 0.0)
            b_sum = tl.dot(tl.trans(b_dropped), b_ds, b_accs[i], input_precision="ieee")
            b_sums = b_sums + (b_sum,)  # type: ignore[assignment]  # noqa: RUF005
        b_accs = b_sums

    o_tile = o_r[None, :] * C + o_c[:, None]
    if p_partial is None:
        for i in tl.static_range(COUNT):
            b_da = (b_accs[i] * keep_scale).to(p_da[i].dtype.element_ty)
            tl.store(p_da[i] + o_tile, b_da, mask=m_c[:, None] & (o_r < R[i])[None, :])
    else:
        for i in tl.static_range(COUNT):
            m_tile = m_c[:, None] & (o_r < R[i])[None, :]
            p_tile = p_partial + tl.cast(offset_r[i], tl.int64) * C + o_tile
            tl.store(p_tile + i_split.to(tl.int64) * stride_partial, b_accs[i], mask=m_tile)
        if is_last(p_counter + i_c * tl.num_programs(1) + i_r, tl.num_programs(2)):
            for i in tl.static_range(COUNT):
                m_tile = m_c[:, None] & (o_r < R[i])[None, :]
                p_tile = p_partial + tl.cast(offset_r[i], tl.int64) * C + o_tile
                b_da = sum_partials(p_tile, m_tile, tl.num_programs(2), stride_partial) * keep_scale
                tl.store(p_da[i] + o_tile, b_da.to(p_da[i].dtype.element_ty), mask=m_tile)


def stacked_grad(
    x: Tensor,
    dSs: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    dropout_p: float = 0.0,
    seeds: Sequence[Tensor | None] = (),
    *,
    packed: Sequence[Tensor | None] | None = None,
    up: Tensor | None = None,
    activation: str | None = None,
) -> list[Tensor]:
    """dA_i [r_i, C] in dtypes[i] from dS_i [M, r_i] in x's dtype, with unit columns, and x [M, C].

    Args:
        x: any strides; the gate's pre-activation g when `up` is given.
        dSs: one a projection.
        dtypes: of the results.
        dropout_p: probability of dropping an element of x (of h).
        seeds: `seeds[i]` holds the int64 of mask i; read only with dropout.
        packed: uint8 [M, ceil(C / 4)] each, receives mask i (`dropout.pack_mask`) where given.
        up: u [M, C]; the sum is then over `h = act(x) * u`, rounded to x's dtype.
        activation: with `up`, one of `activation.ACTIVATIONS`.
    """
    m, c = x.shape
    ranks = tuple(dS.shape[1] for dS in dSs)
    wide = (x,) if up is None else (x, up)
    candidates = configs.rows(STACKED_GRAD, *wide)
    config = next((row for row in candidates if row.block_r >= max(ranks)), candidates[-1])
    block_r = config.r_tile(max(ranks))
    tiles_c, tiles_r = launch.cdiv(c, config.block_n), launch.cdiv(max(ranks), block_r)
    splits, per_split = launch.split_reduction(
        tiles_c * tiles_r, launch.cdiv(m, config.block_m), launch.unit_count(x.device)
    )
    is_split = splits > 1
    results = [launch.empty((r, c), dtype, x) for r, dtype in zip(ranks, dtypes, strict=True)]
    stacked_grad_kernel[(tiles_c, tiles_r, splits)](
        p_x=x,
        p_u=up,
        p_ds=tuple(dSs),
        p_da=tuple(results),
        p_partial=launch.empty((splits, sum(ranks), c), launch.PARTIAL_DTYPE, x) if is_split else None,
        p_counter=launch.counters(tiles_c * tiles_r, x) if is_split else None,
        p_seed=tuple(seeds) if dropout_p > 0.0 else None,
        p_packed=(None,) * len(dSs) if packed is None else tuple(packed),
        M=m,
        C=c,
        R=ranks,
        stride_xm=x.stride(0),
        stride_xc=x.stride(1),
        stride_um=0 if up is None else up.stride(0),
        stride_uc=0 if up is None else up.stride(1),
        stride_sm=tuple(dS.stride(0) for dS in dSs),
        offset_r=tuple(accumulate(ranks[:-1], initial=0)),
        stride_partial=sum(ranks) * c,
        tiles_per_split=per_split,
        keep_scale=1.0 / (1.0 - dropout_p),
        dropout_p=dropout_p,
        COUNT=len(dSs),
        ACTIVATION=activation,
        HAS_DROPOUT=dropout_p > 0.0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=launch.FP_FUSION,
        **configs.all_registers(x.device),
    )
    return results
