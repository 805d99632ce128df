"""A gated MLP's kernels: `h = act(g) * u` of two projections of one x, and the way back through it.

    S  = [drop(x) A_g^T, drop(x) A_u^T]                       stacked_down          one read of x
    g, u = the two projections of x;  h = act(g) * u          glu_gemm              one read of x
    y  = the down projection of h                             `lora`, `dora`: the caller
    dS = s (c * dY) B, dB, dm, dbias                          reduce_dy             one read of dY
    dg = dh * u * act'(g), du = dh * act(g)                   glu_backward_gemm     dh is never written
    dA = dS^T drop(h), h made again from g and u              stacked_grad          one read of g and u
    gradients of gate and up from dg and du                   `stacked_backward`

Kept for backward: x, S, g, u and the down projection's S; not h. act is silu (SwiGLU), gelu (GeGLU, by erf)
or gelu_tanh. Each of the three projections has its own adapter or none, LoRA or DoRA, and its own mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .activation import ACTIVATIONS
from .check import check_backward
from .glu_dh import glu_backward_gemm
from .glu_gemm import glu_gemm
from .packed_mask import empty_mask, fill_mask
from .primitives import KeptProduct
from .projection import Projection
from .stacked import check_projection, down_all, projection_gradients, rank_of, row_scale_of, seed_list
from .stacked_grad import stacked_grad


class GluForward(NamedTuple):
    """Results of `glu_forward`, all [M, N] but S [M, r_gate + r_up]; None where not asked for."""

    h: Tensor
    g: Tensor | None
    u: Tensor | None
    S: Tensor
    z_g: Tensor | None
    z_u: Tensor | None


class GluGradients(NamedTuple):
    """Gradients of `act(g) * u` and of the down projection behind it; None where not asked for."""

    dg: Tensor | None
    du: Tensor | None
    dA: Tensor | None
    dB: Tensor | None
    dm: Tensor | None
    dbias: Tensor | None


def check_activation(activation: str) -> None:
    """ValueError unless the kernels have the activation."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def glu_forward(
    x: Tensor,
    gate: Projection,
    up: Projection,
    activation: str,
    dropout_p: float = 0.0,
    seeds: Tensor | None = None,
    *,
    keep: bool = True,
    keep_z: tuple[bool, bool] = (False, False),
) -> GluForward:
    """`h = act(g) * u`, with g and u the projections of `stacked_forward`; act in fp32, on g and u in fp32.

    Args:
        x: [M, K], fp32, fp16 or bf16, any strides.
        gate: [N, K], its output goes through act.
        up: [N, K].
        activation: silu, gelu (exact, by erf) or gelu_tanh.
        dropout_p: probability of dropping an element of x in front of each A, in [0, 1).
        seeds: int64 [2] on x's device, for gate and up; required when dropout_p > 0.
        keep: whether g and u are wanted, for backward.
        keep_z: where z, the product before the row scale, is wanted too: dm of a projection with a bias.
    """
    check_activation(activation)
    masks = seed_list(seeds, 2, dropout_p)
    for projection, seed in zip((gate, up), masks, strict=True):
        check_projection("x", x, gate.weight.shape[1], projection, dropout_p, seed)
    if gate.weight.shape != up.weight.shape:
        raise ValueError(
            f"expected gate and up of one shape, got {list(gate.weight.shape)} and {list(up.weight.shape)}"
        )
    m, n = x.shape[0], gate.weight.shape[0]
    if m == 0:
        g, u, z_g, z_u = (x.new_empty((0, n)) if wanted else None for wanted in (keep, keep, *keep_z))
        return GluForward(x.new_empty((0, n)), g, u, x.new_empty((0, rank_of(gate) + rank_of(up))), z_g, z_u)
    with launch.on_device(x):
        S = down_all(x, (gate, up), dropout_p, masks)
        h, g, u, (z_g, z_u) = glu_gemm(x, gate, up, S, activation, keep=keep, keep_z=keep_z)
    return GluForward(h, g, u, S, z_g, z_u)


def glu_backward(
    dy: Tensor,
    down: Projection,
    S_down: Tensor | None,
    kept: Tensor | None,
    g: Tensor,
    u: Tensor,
    activation: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    kept_is_z: bool = False,
    need_h: bool,
    need_A: bool,
    need_B: bool,
    need_m: bool,
    need_bias: bool,
    bias_dtype: torch.dtype | None = None,
) -> GluGradients:
    """From dY of the down projection `y = c * (h W^T + s S B^T) + bias` back to g and u.

    Args:
        dy: [M, K] in the weight's dtype, any strides.
        down: [K, N].
        S_down: [M, r] of the down projection's forward; None without an adapter.
        kept: [M, K], its y or z, where dm is wanted.
        g: [M, N] from `glu_forward`, like u.
        u: [M, N].
        activation: as in forward.
        dropout_p: probability of dropping an element of h in front of the down projection's A.
        seed: one int64 on the device, the down projection's; the same mask again.
        kept_is_z: whether `kept` is z.
        need_h: whether dg and du are wanted.
        need_A: whether dA of the down projection is wanted; the other flags likewise.
        need_B: whether dB is wanted.
        need_m: whether dm is wanted.
        need_bias: whether dbias is wanted.
        bias_dtype: dtype of dbias; dy's when None.

    Returns: dg and du [M, N] in dy's dtype, the others in the dtypes of their parameters, from fp32 sums.
    """
    check_activation(activation)
    check_projection("dy", dy, down.weight.shape[0], down, dropout_p, seed)
    S = dy.new_empty((dy.shape[0], 0)) if S_down is None else S_down
    check_backward(dy, g, down.weight, S)
    check_backward(dy, u, down.weight, S)
    row_scale = row_scale_of(down)
    with launch.on_device(dy):
        dS, dB, dbias, dm = projection_gradients(
            dy,
            down,
            S,
            row_scale,
            None if kept is None else KeptProduct(values=kept, is_z=kept_is_z),
            need_S=need_h or need_A,
            need_B=need_B,
            need_m=need_m,
            bias_dtype=(bias_dtype or dy.dtype) if need_bias else None,
        )
        if dy.shape[0] == 0:
            dg, du = (torch.empty_like(g), torch.empty_like(u)) if need_h else (None, None)
            dA = down.lora_A.new_zeros(down.lora_A.shape) if need_A and down.lora_A is not None else None
            return GluGradients(dg, du, dA, dB, dm, dbias)
        dg, du, dA, packed = None, None, None, None
        if need_h and dropout_p > 0.0 and dS is not None:
            packed = empty_mask(g.shape[0], g.shape[1], g)
        if need_A and dS is not None and down.lora_A is not None:
            dtypes, filled = [down.lora_A.dtype], [packed]
            (dA,) = stacked_grad(
                g, [dS], dtypes, dropout_p, [seed], packed=filled, up=u, activation=activation
            )
        elif packed is not None and seed is not None:
            fill_mask(packed, g.shape[1], dropout_p, seed)
        if need_h:
            c, keep_scale = None if row_scale is None else row_scale.c, 1.0 / (1.0 - dropout_p)
            dg, du = glu_backward_gemm(dy, down, dS, c, g, u, activation, packed, keep_scale)
    return GluGradients(dg, du, dA, dB, dm, dbias)
