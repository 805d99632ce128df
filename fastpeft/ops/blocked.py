"""LoRA and DoRA on a CPU that multiplies fp32 faster than 16 bits: products in fp32, by blocks of W's rows.

Without matrix units a CPU may take longer for a bf16 GEMM than for an fp32 one (an AVX512-BF16 Xeon without
AMX: 75 against 125 GFLOP/s a thread, at 512 x 768 x 768), and one without 16-bit arithmetic much longer.
Casting the operands costs one pass; casting all of W would cost an [out_features, in_features] fp32
temporary, so W is taken in blocks of rows that stay in the cache while they are used (a weight of less than
``BLOCK_BYTES`` in fp32 is one block).

The blocks also fuse: a block of y gets its rank-r product, row scale and bias before it is rounded, once; and
one read of a block of dY gives its share of dx, dS, dB, dbias and dm. The masters of fp32 adapters are used
as they are, and dA and dB are never rounded to 16 bits.

Tried and not kept: W's block copied beside its rows of ``s B``, so that ``[x | S] [W | sB]^T`` and
``dY [W | sB] = [dx | dS]`` are one GEMM each. Predicted 5% less time; measured within 1% either way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpeft.ops.dropout import keep, keep_, keep_bits, keep_scale
from fastpeft.ops.products import Dropout, Forward, Gradients, Need, RowScale

# Of fp32 weights. Measured from 1 to 16 MiB: less makes more calls than it saves in cache misses.
BLOCK_BYTES = 2**22
MIN_ROWS = 64


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Yield the rows of W block by block; one block without a row, where there are none."""
    out_features, in_features = weight.shape
    rows = max(MIN_ROWS, BLOCK_BYTES // (4 * max(in_features, 1)))
    return (slice(start, min(start + rows, out_features)) for start in range(0, max(out_features, 1), rows))


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return ``total + a b``, in total's memory: a first product needs no zeros to be added to."""
    return a @ b if total is None else total.addmm_(a, b)


def weight_product(weight: Tensor, lora_A: Tensor) -> Tensor:
    """Return W A^T [out_features, r] in fp32."""
    At = lora_A.float().t()
    return torch.cat([weight[rows].float() @ At for rows in _blocks(weight)])


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout | None,
    scale: RowScale | None,
    keep_z: bool,
) -> Forward:
    """x is [tokens, in_features] in 16 bits, ``scale`` DoRA's; the rest is as the ops take it."""
    x32, A = x.float(), lora_A.float()
    c = None if scale is None else scale.c
    kept, k = x32, 1.0
    if dropout is not None:
        kept = keep(x32, keep_bits(x.shape, dropout.p, dropout.seed, x32))
        k = keep_scale(dropout.p)
    S = kept @ A.t()
    if k != 1.0:
        S.mul_(k)
    sB = lora_B.float() * scaling
    on_base = c is not None and dropout is not None and dropout.on_base
    y = x.new_empty(x.shape[0], weight.shape[0])
    z = torch.empty_like(y) if keep_z else None
    for rows in _blocks(weight):
        W = weight[rows].float()
        product = (S @ sB[rows].t()).addmm_(kept if on_base else x32, W.t(), alpha=k if on_base else 1.0)
        if z is not None:
            z[:, rows] = product
        if on_base:
            assert c is not None
            product = (S @ sB[rows].t()).addmm_(x32, W.t()).addcmul_(product, c[rows] - 1.0)
        elif c is not None:
            product.mul_(c[rows])
        y[:, rows] = product if bias is None else product.add_(bias[rows])
    return Forward(y=y, S=S.to(x.dtype), z=z)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout: Dropout | None,
    need: Need,
    scale: RowScale | None,
    kept: Tensor | None,
) -> Gradients:
    """dy and kept (for ``need.dot``) are [tokens, out_features]."""
    (tokens, out_features), in_features = dy.shape, weight.shape[1]
    A, sB, S32 = lora_A.float(), lora_B.float() * scaling, S.float()
    c = None if scale is None else scale.c

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=dy.device)

    bits, k = None, 1.0
    if dropout is not None and (need.x or need.A):
        bits = keep_bits((tokens, in_features), dropout.p, dropout.seed, A)
        k = keep_scale(dropout.p)
    on_base = c is not None and dropout is not None and dropout.on_base
    result = Gradients(
        B=empty(*lora_B.shape) if need.B else None,
        bias=empty(out_features) if need.bias else None,
        dot=empty(out_features) if need.dot else None,
    )
    dS: Tensor | None = None
    dx: Tensor | None = None
    dropped_dx: Tensor | None = None
    for rows in _blocks(weight):
        dy32 = dy[:, rows].float()
        if result.bias is not None:
            result.bias[rows] = dy32.sum(0)
        if result.dot is not None:
            assert kept is not None
            result.dot[rows] = (dy32 * kept[:, rows]).sum(0)
        g = dy32 if c is None else dy32 * c[rows]
        if need.x:
            W = weight[rows].float()
            dx = _plus(dx, dy32 if on_base else g, W)
            if bits is not None and on_base:
                # The base product on x has dY's gradient; the one on the dropped x has what c adds to it.
                dropped_dx = _plus(dropped_dx, g - dy32, W)
        if need.x or need.A:
            dS = _plus(dS, g, sB[rows])
        if result.B is not None:
            torch.mm(g.t(), S32, out=result.B[rows])
    if result.B is not None:
        result.B.mul_(scaling)
    if dx is not None:
        assert dS is not None
        if bits is None:
            dx.addmm_(dS, A)
        else:
            dx.add_(keep_(_plus(dropped_dx, dS, A), bits), alpha=k)
        result.x = dx.to(dy.dtype)
    if need.A:
        assert x is not None
        assert dS is not None
        x32 = x.float()
        dA = dS.t() @ (x32 if bits is None else keep_(x32, bits))
        result.A = dA if k == 1.0 else dA.mul_(k)
    return result
