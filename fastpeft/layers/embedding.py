"""``nn.Embedding`` with adapters: ``W[ids] + scaling * A^T[ids] B^T``, and DoRA's ``m / n`` times it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.layers.adapted import Adapter, suppressed
from fastpeft.layers.adapter import AdapterMixin, AdapterSpec
from fastpeft.layers.norm_cache import NormCache
from fastpeft.layers.rows import Rows
from fastpeft.ops.row_norm import row_norm, row_norm_squared, row_scale


def embedding_with_adapter(
    result: Tensor,
    rows: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    embed_scale: Tensor | None,
    c: Tensor | None,
) -> Tensor:
    """``c * (result + scaling * embed_scale * rows B^T)``, added in the pass of the product.

    Args:
        result: [..., embedding_dim], what is there so far.
        rows: [..., r], the rows of ``A^T`` for the ids.
        lora_B: [embedding_dim, r].
        scaling: a tensor as in a hot-swap compiled for many adapters.
        embed_scale: what the embedding multiplies its rows by, if it does.
        c: DoRA's row scale [embedding_dim], None for LoRA.
    """
    dtype, shape = result.dtype, result.shape
    right = lora_B.t().to(dtype)
    if isinstance(scaling, Tensor):
        right, scaling = right * scaling.to(dtype), 1.0
    if embed_scale is not None:
        right = right * embed_scale.to(dtype)
    flat = result.reshape(-1, shape[-1])
    y = torch.addmm(flat, rows.to(dtype).reshape(-1, rows.shape[-1]), right, alpha=scaling)
    return (y if c is None else (y * c).to(dtype)).view(shape)


def embedding_row_scale(
    parameter: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float | Tensor,
    cache: NormCache | None,
) -> Tensor:
    """DoRA's row scale [embedding_dim], of the norms of the columns of the embedding's weight."""
    weight, norm = parameter.t(), None
    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * scaling, 1.0
    elif cache is not None:
        norm = cache.norm(parameter, weight, lora_A, lora_B, scaling)
    if norm is None:
        with torch.no_grad():
            norm = row_norm(weight, lora_A, lora_B, scaling, row_norm_squared(weight))
    return row_scale(magnitude, norm)


class EmbeddingMixin(AdapterMixin):
    """Forward of an embedding with adapters; the sibling base class is the patched module's own.

    ``lora_A`` is [r, num_embeddings], zero at first, and ``lora_B`` [embedding_dim, r], as PEFT's.
    """

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    def weight_out_in(self) -> Tensor:
        """Return the weight [num_embeddings, embedding_dim] as a transposed view."""
        return self.weight.t()

    def initialise(self, lora_A: Tensor, lora_B: Tensor, weight: Tensor, spec: AdapterSpec) -> None:
        """Zero A and normal B, as PEFT for every initialisation but False."""
        nn.init.normal_(lora_A) if spec.init_lora_weights is False else nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)

    def rewrites(self, spec: AdapterSpec) -> bool:
        """No initialisation moves a part of an embedding."""
        return False

    def forward(self, x: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Ids [...] to [..., embedding_dim]."""
        if x is None:
            x = self.input_of(kwargs)
        result = self.base_forward(x)
        if not self.adapters_enabled or self.merged_adapters:
            return result
        if self.row_adapters is not None:
            return self._by_row(result, x, self.row_adapters)
        base = result
        for adapter in self.adapters():
            result = self._with_adapter(result, x, adapter)
        return result if self.response is None else suppressed(base, result, self.response)

    def _with_adapter(self, result: Tensor, ids: Tensor, adapter: Adapter) -> Tensor:
        A, B, m, scaling = adapter.lora_A, adapter.lora_B, adapter.magnitude, adapter.scaling
        c = None
        if m is not None:
            # Compiled code computes its norm, and has no names.
            cache = None if torch.compiler.is_compiling() else self.norm_cache(adapter.name)
            c = embedding_row_scale(self.weight, A, B, m, scaling, cache)
        return embedding_with_adapter(result, self._rows_of(A, ids), B, scaling, self._embed_scale(), c)

    def _by_row(self, result: Tensor, ids: Tensor, names: tuple[str, ...]) -> Tensor:
        """Each row by its own adapter, in one product for all.

        Every A is read at the ids alone: A of all adapters side by side would be a copy of sum of r times
        num_embeddings elements, 39 MB for four of r=16 and 152,000 tokens.
        """
        rows = Rows.of(ids, names, self.adapters(list(self.specs)))
        if not rows.adapters:
            return result
        S = rows.own(
            torch.cat([self._rows_of(a.lora_A, ids) for a in rows.adapters], dim=-1).to(result.dtype)
        )
        if (embed_scale := self._embed_scale()) is not None:
            S = S * embed_scale.to(S.dtype)
        return rows.added(result, S, None, self.weight_out_in, self.kept_norm)

    def _rows_of(self, lora_A: Tensor, ids: Tensor) -> Tensor:
        """Return the rows of ``A^T`` [..., r] for ids [...]."""
        return F.embedding(
            ids, lora_A.t(), self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse
        )

    def _embed_scale(self) -> Tensor | None:
        """Return what the embedding multiplies its rows by, if it does."""
        scale = getattr(self, "embed_scale", None)
        if isinstance(scale, (int, float)):
            return torch.tensor(float(scale), device=self.weight.device)
        return scale

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return nn.Embedding's result."""
        return nn.Embedding.forward(self, x)  # type: ignore[arg-type]  # the sibling is one


class LoRAEmbedding(EmbeddingMixin, nn.Embedding):  # type: ignore[misc]  # forward takes more
    """Drop-in for the ``nn.Embedding`` it was made from, whose weight it shares."""

    bias = None

    def extra_repr(self) -> str:
        """Return nn.Embedding's line and the adapters'."""
        return f"{nn.Embedding.extra_repr(self)}, {self.adapter_repr()}"
