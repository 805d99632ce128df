"""A mixed batch: every row names its adapter, and all adapters are computed together.

The adapters' A, one below the other, make one product with all rows; what belongs to other adapters' rows is
zeroed in that [tokens, sum of r] result; the adapters' B, side by side, make one product with it. So there
are two products whatever the number of adapters, for ranks that are small beside the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.errors import ShapeError
from fastpeft.layers.adapted import Adapter, Base
from fastpeft.ops._common import accumulation_dtype
from fastpeft.ops.probability import dropped, is_dropping
from fastpeft.ops.row_norm import row_norm, row_norm_squared, row_scale


def added_by_row(
    result: Tensor,
    x: Tensor,
    names: Sequence[str],
    adapters: Sequence[Adapter],
    base: Base,
    last: Sequence[int | None] | None = None,
    drops: bool = False,
) -> Tensor:
    """Return ``result`` [rows, ..., out_features] with each row's adapter of x [rows, ..., in_features].

    A name that is none of ``adapters`` leaves its rows as they are. ``last``: for each row, how many of its
    last tokens have the adapter, None for all; for LoRA and x of [rows, in_features] or [rows, tokens,
    in_features]. ``drops``: whether the adapters' dropout counts, for LoRA alone, as PEFT trains activated
    LoRA; other mixed batches are for inference.

    Raises:
        ShapeError: there is not one name for each row.
    """
    if x.shape[0] != len(names):
        raise ShapeError(
            f"a mixed batch: expected {len(names)} rows, one for each name, got x {list(x.shape)}"
        )
    used = [adapter for adapter in adapters if adapter.name in names]
    if not used:
        return result
    x = x.to(result.dtype)
    index = [
        [adapter.name for adapter in used].index(n) if n in {a.name for a in used} else -1 for n in names
    ]
    chosen = torch.tensor(index, device=x.device)
    shape = (-1, *[1] * (x.dim() - 1))
    if drops:
        for i, a in enumerate(used):
            if is_dropping(a.dropout_p):
                x = torch.where((chosen == i).view(shape), dropped(x, a.dropout_p), x)
    owner = torch.cat([torch.full((a.lora_A.shape[0],), i) for i, a in enumerate(used)]).to(x.device)
    S = x @ torch.cat([a.lora_A for a in used]).to(x.dtype).t()
    S = S * (owner == chosen.view(shape)).to(S.dtype)
    if last is not None:
        tokens = x.shape[1] if x.dim() == 3 else 1
        counts = torch.tensor([tokens if n is None else min(n, tokens) for n in last], device=x.device)
        taken = torch.arange(tokens, device=x.device) >= (tokens - counts)[:, None]
        S = S * taken.view(*S.shape[:-1], 1).to(S.dtype)
    B = torch.cat([a.lora_B * a.scaling for a in used], dim=1).to(x.dtype)
    if all(adapter.magnitude is None for adapter in used):
        return result + S @ B.t()
    product = result if base.bias is None else result - base.bias.to(result.dtype)
    scaled = (product + S @ B.t()) * _scales(used, base)[chosen].view(len(names), *shape[1:-1], -1)
    return (scaled if base.bias is None else scaled + base.bias).to(result.dtype)


def _scales(adapters: Sequence[Adapter], base: Base) -> Tensor:
    """DoRA's row scale of every adapter, [adapters + 1, out_features]; ones for LoRA and, last, for none."""
    weight = base.weight()
    squared = row_norm_squared(weight)
    scales = []
    for a in adapters:
        if a.magnitude is None:
            scales.append(torch.ones(weight.shape[0], device=weight.device))
            continue
        with torch.no_grad():
            norm = row_norm(weight, a.lora_A, a.lora_B, a.scaling, squared)
        scales.append(row_scale(a.magnitude, norm))
    dtype = accumulation_dtype(weight.dtype)
    scales.append(torch.ones(weight.shape[0], device=weight.device))
    return torch.stack([scale.to(dtype) for scale in scales])
