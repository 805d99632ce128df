"""Virtual tokens in front of a decoder's input: their numbers, and the hook that puts them there.

Prefix tuning gives every layer keys and values, by way of the cache; prompt tuning gives the first layer
embeddings. Either way the attention mask grows by them and positions count them; ``generate`` works as ever.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import PatchError, ShapeError

CHILD = "prompt_encoder"  # its name in the model, PEFT's word


class PromptEncoder(nn.Module):
    """``num_virtual_tokens`` rows: learned as they are, or ``W_2 tanh(W_1 e + b_1) + b_2`` of learned e.

    Args:
        num_virtual_tokens: rows, n.
        width: of a row, w.
        token_dim: features of e.
        hidden_size: of the MLP between; None for none.
        kind: ``dtype`` and ``device`` of the parameters.
    """

    adapters_enabled = True

    def __init__(
        self, num_virtual_tokens: int, width: int, token_dim: int, hidden_size: int | None, **kind: Any
    ) -> None:
        super().__init__()
        self.transform: nn.Sequential | None = None
        if hidden_size is None:
            self.embedding = nn.Embedding(num_virtual_tokens, width, **kind)
            return
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim, **kind)
        self.transform = nn.Sequential(
            nn.Linear(token_dim, hidden_size, **kind), nn.Tanh(), nn.Linear(hidden_size, width, **kind)
        )

    def forward(self) -> Tensor:
        """Return the rows, [n, w]."""
        rows: Tensor = self.embedding.weight
        return rows if self.transform is None else self.transform(rows)


class PrefixEncoder(PromptEncoder):
    """Rows of keys and values: [n, layers * 2 * heads * head_dim], for each layer its key, then its value.

    Args:
        shape: (layers, heads of keys, features of a head).
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        shape: tuple[int, int, int],
        token_dim: int,
        hidden_size: int | None,
        **kind: Any,
    ) -> None:
        layers, heads, head_dim = self.shape = shape
        super().__init__(num_virtual_tokens, layers * 2 * heads * head_dim, token_dim, hidden_size, **kind)

    def fill(self, cache: Any, batch: int, dtype: torch.dtype) -> None:
        """Write keys and values into an empty cache, the same for every row of the batch."""
        layers, heads, head_dim = self.shape
        rows = self().to(dtype)
        states = rows.view(len(rows), layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)
        for layer, (keys, values) in enumerate(states):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)


def attach(model: nn.Module, encoder: PromptEncoder) -> None:
    """Put virtual tokens in front of the model's input."""
    model.add_module(CHILD, encoder)
    model.register_forward_pre_hook(_prompted, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`, be it half done."""
    model._modules.pop(CHILD, None)
    for identity in [i for i, hook in model._forward_pre_hooks.items() if hook is _prompted]:
        del model._forward_pre_hooks[identity]
        model._forward_pre_hooks_with_kwargs.pop(identity, None)


def _prompted(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    encoder: Any = model._modules[CHILD]
    if not encoder.adapters_enabled:
        return None
    given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    source = ids if embeddings is None else embeddings
    if not isinstance(source, Tensor):
        raise ShapeError(f"{type(encoder).__name__}: expected input_ids or inputs_embeds, got neither")
    n = encoder.embedding.num_embeddings
    cache = given.get("past_key_values")
    is_first = cache is None or cache.get_seq_length() == 0  # later tokens find the first ones' keys there
    _extend(given, n, len(source), prepend=is_first and not isinstance(encoder, PrefixEncoder))
    given.pop("cache_position", None)  # that of the tokens alone; the model counts the cache by itself
    dtype = next(p for name, p in model.named_parameters() if not name.startswith(f"{CHILD}.")).dtype
    if is_first and isinstance(encoder, PrefixEncoder):
        given["past_key_values"] = _with_prefix(model, encoder, cache, len(source), dtype)
    elif is_first:
        get_embeddings: Any = model.get_input_embeddings
        rows = get_embeddings()(ids) if embeddings is None else embeddings
        prompt = encoder().to(rows.dtype).expand(len(rows), -1, -1)
        given.update(input_ids=None, inputs_embeds=torch.cat([prompt, rows], dim=1))
        labels = given.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:  # of tokens
            given["labels"] = torch.cat([labels.new_full((len(rows), n), -100), labels], dim=1)
    return (), given


def _extend(given: dict[str, Any], n: int, batch: int, *, prepend: bool) -> None:
    """Let the mask and the positions count n more tokens before those that are there."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ShapeError(f"virtual tokens: expected an attention_mask [batch, tokens], got {shape}")
        given["attention_mask"] = torch.cat([mask.new_ones(batch, n), mask], dim=1)
    if positions is not None:
        positions = positions + n
        if prepend:
            virtual = torch.arange(n, device=positions.device).expand(len(positions), -1)
            positions = torch.cat([virtual, positions], dim=1)
        given["position_ids"] = positions


def _with_prefix(model: nn.Module, encoder: PrefixEncoder, cache: Any, batch: int, dtype: torch.dtype) -> Any:
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise PatchError(
            "prefix tuning hands its prefix over in the cache, which activation checkpointing leaves out: "
            "call model.gradient_checkpointing_disable()"
        )
    if cache is None:
        from transformers import DynamicCache

        config: Any = model.config
        cache = DynamicCache(config=config)
    encoder.fill(cache, batch, dtype)
    return cache
