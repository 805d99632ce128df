"""A mixed batch: every row names its adapter, and all adapters are computed together.

The adapters' A, one below the other, make one product with all rows; what belongs to other adapters' rows is
zeroed in that [tokens, sum of r] result; the adapters' B, side by side, make one product with it. So there
are two products whatever the number of adapters, for ranks that are small beside the layer. DoRA's row scales
stand in one table, from norms that are kept, or from products for all adapters together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft.errors import ShapeError
from fastpeft.layers.adapted import Adapter, Base
from fastpeft.ops._common import accumulation_dtype, scaled_cast, without_autocast
from fastpeft.ops.probability import dropped, is_dropping
from fastpeft.ops.row_norm import row_norm_squared, row_scale


@dataclass(frozen=True, slots=True)
class Rows:
    """Which adapter every row of a batch has.

    Attributes:
        adapters: those that some row has.
        chosen: int64 [rows], each row's place among them; -1 for none.
    """

    adapters: list[Adapter]
    chosen: Tensor

    @staticmethod
    def of(x: Tensor, names: Sequence[str], adapters: Sequence[Adapter]) -> Rows:
        """Return the rows of x [rows, ...]; a name that is none of ``adapters`` stands for none.

        Raises:
            ShapeError: there is not one name for each row.
        """
        if x.shape[0] != len(names):
            raise ShapeError(
                f"a mixed batch: expected {len(names)} rows, one for each name, got x {list(x.shape)}"
            )
        used = [adapter for adapter in adapters if adapter.name in names]
        places = {adapter.name: place for place, adapter in enumerate(used)}
        return Rows(used, torch.tensor([places.get(name, -1) for name in names], device=x.device))

    def own(self, S: Tensor) -> Tensor:
        """Return S [rows, ..., sum of r] with zeros in what is of other adapters than the row's."""
        owner = _owners(self.adapters, S.device)
        return S * (owner == self.chosen.view(-1, *[1] * (S.dim() - 1))).to(S.dtype)

    def added(
        self,
        result: Tensor,
        S: Tensor,
        bias: Tensor | None,
        weight: Callable[[], Tensor],
        kept_norm: Callable[[Adapter], Tensor | None] | None,
    ) -> Tensor:
        """Return ``result`` with every row's B S added, and scaled where the row's adapter is DoRA.

        Args:
            result: [rows, ..., out_features], of the base.
            S: [rows, ..., sum of r], each row's own.
            bias: of the base, outside the row scale, or None.
            weight: returns the base's weight [out_features, in_features].
            kept_norm: returns an adapter's row norm if it is kept.
        """
        B = torch.cat([a.lora_B * a.scaling for a in self.adapters], dim=1).to(S.dtype)
        if all(adapter.magnitude is None for adapter in self.adapters):
            return result + S @ B.t()
        product = result if bias is None else result - bias.to(result.dtype)
        c = self._row_scales(weight, kept_norm)[self.chosen]
        scaled = (product + S @ B.t()) * c.view(len(c), *[1] * (result.dim() - 2), -1)
        return (scaled if bias is None else scaled + bias).to(result.dtype)

    def _row_scales(
        self, weight: Callable[[], Tensor], kept_norm: Callable[[Adapter], Tensor | None] | None
    ) -> Tensor:
        """DoRA's row scale of every adapter, [adapters + 1, out_features]; 1 for LoRA and, last, for none."""
        dora = [a for a in self.adapters if a.magnitude is not None]
        norms = {a.name: norm for a in dora if kept_norm is not None and (norm := kept_norm(a)) is not None}
        if rest := [a for a in dora if a.name not in norms]:
            norms |= zip((a.name for a in rest), row_norms(weight(), rest), strict=True)
        ones = torch.ones_like(norms[dora[0].name])
        scales = [
            ones if a.magnitude is None else row_scale(a.magnitude, norms[a.name]) for a in self.adapters
        ]
        return torch.stack([*scales, ones])


def added_by_row(
    result: Tensor,
    x: Tensor,
    names: Sequence[str],
    adapters: Sequence[Adapter],
    base: Base,
    last: Sequence[int | None] | None = None,
    kept_norm: Callable[[Adapter], Tensor | None] | None = None,
    drops: bool = False,
) -> Tensor:
    """Return ``result`` [rows, ..., out_features] with each row's adapter of x [rows, ..., in_features].

    A name that is none of ``adapters`` leaves its rows as they are. ``last`` is, for each row, how many of
    its last tokens have the adapter, None for all; for LoRA and x of [rows, in_features] or [rows, tokens,
    in_features]. ``kept_norm`` returns a DoRA adapter's row norm where the layer keeps it. ``drops``: whether
    the adapters' dropout counts, for LoRA alone, as PEFT trains activated LoRA; other mixed batches are for
    inference.

    Raises:
        ShapeError: there is not one name for each row.
    """
    rows = Rows.of(x, names, adapters)
    if not rows.adapters:
        return result
    x = x.to(result.dtype)
    if drops:
        for i, adapter in enumerate(rows.adapters):
            if is_dropping(adapter.dropout_p):
                is_its = (rows.chosen == i).view(-1, *[1] * (x.dim() - 1))
                x = torch.where(is_its, dropped(x, adapter.dropout_p), x)
    S = rows.own(x @ torch.cat([a.lora_A for a in rows.adapters]).to(x.dtype).t())
    if last is not None:
        tokens = x.shape[1] if x.dim() == 3 else 1
        counts = torch.tensor([tokens if n is None else min(n, tokens) for n in last], device=x.device)
        taken = torch.arange(tokens, device=x.device) >= (tokens - counts)[:, None]
        S = S * taken.view(*S.shape[:-1], 1).to(S.dtype)
    return rows.added(result, S, base.bias, base.weight, kept_norm)


@torch.no_grad()
@without_autocast
def row_norms(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Return ``||W + s B A||`` per output row of every adapter, [adapters, out_features] in fp32 (fp64).

    By :mod:`fastpeft.ops.row_norm`'s formula, with the same four products for any number of adapters.
    """
    dtype = accumulation_dtype(weight.dtype)
    A = torch.cat([a.lora_A for a in adapters])
    sB = torch.cat([scaled_cast(a.lora_B, a.scaling, dtype) for a in adapters], dim=1)
    U = weight @ A.to(weight.dtype).t()  # [out_features, sum of r], the only product that reads W
    owner = _owners(adapters, weight.device)
    own = (owner[:, None] == torch.arange(len(adapters), device=weight.device)).to(dtype)
    A = A.to(dtype)
    # What two adapters have in common is no part of either's norm.
    cross = torch.addmm(U.to(dtype), sB, (A @ A.t()) * (owner[:, None] == owner), beta=2.0)
    # Not index_add, whose order of summation is left to a GPU's atomics.
    return (row_norm_squared(weight) + ((sB * cross) @ own).t()).clamp_(min=0.0).sqrt_()


def _owners(adapters: Sequence[Adapter], device: torch.device) -> Tensor:
    """Return, for each of the adapters' ranks side by side, whose it is: int64 [sum of r]."""
    return torch.cat([torch.full((a.lora_A.shape[0],), i) for i, a in enumerate(adapters)]).to(device)
