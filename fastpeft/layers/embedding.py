"""``nn.Embedding`` with adapters: ``W[ids] + scaling * A^T[ids] B^T``, and DoRA's ``m / n`` times it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.layers.adapted import suppressed
from fastpeft.layers.adapter import AdapterMixin, AdapterSpec
from fastpeft.layers.norm_cache import NormCache
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
    cache: NormCache,
) -> Tensor:
    """DoRA's row scale [embedding_dim], of the norms of the columns of the embedding's weight."""
    weight, norm = parameter.t(), None
    if isinstance(scaling, Tensor):
        lora_B, scaling = lora_B * scaling, 1.0
    else:
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

    def forward(self, x: Tensor) -> Tensor:
        """Ids [...] to [..., embedding_dim]."""
        result = self.base_forward(x)
        if not self.adapters_enabled or self.merged_adapters:
            return result
        if self.row_adapters is not None:
            return self._by_row(result, x, self.row_adapters)
        base = result
        for name in self.active_adapters:
            if name in self.specs:
                result = self._with_adapter(result, x, name)
        return result if self.response is None else suppressed(base, result, self.response)

    def _with_adapter(self, result: Tensor, ids: Tensor, name: str) -> Tensor:
        A, B, scaling = self.lora_A[name], self.lora_B[name], self.specs[name].scaling
        rows = F.embedding(
            ids, A.t(), self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        c = None
        if self.specs[name].use_dora:
            m = self.lora_magnitude_vector[name]
            c = embedding_row_scale(self.weight, A, B, m, scaling, self.norm_cache(name))
        embed_scale = getattr(self, "embed_scale", None)
        if isinstance(embed_scale, (int, float)):
            embed_scale = torch.tensor(float(embed_scale), device=result.device)
        return embedding_with_adapter(result, rows, B, scaling, embed_scale, c)

    def _by_row(self, result: Tensor, ids: Tensor, names: tuple[str, ...]) -> Tensor:
        """Each row by its own adapter; ids are few numbers, so rows of one adapter go together."""
        mixed = result.clone()
        for name in dict.fromkeys(names):
            if name in self.specs:
                where = torch.tensor([n == name for n in names], device=ids.device)
                mixed[where] = self._with_adapter(result[where], ids[where], name)
        return mixed

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return nn.Embedding's result."""
        return nn.Embedding.forward(self, x)  # type: ignore[arg-type]  # the sibling is one


class LoRAEmbedding(EmbeddingMixin, nn.Embedding):
    """Drop-in for the ``nn.Embedding`` it was made from, whose weight it shares."""

    bias = None

    def extra_repr(self) -> str:
        """Return nn.Embedding's line and the adapters'."""
        return f"{nn.Embedding.extra_repr(self)}, {self.adapter_repr()}"
