"""Virtual tokens in front of a model's input: their numbers, and the hooks that put them there.

Prefix tuning gives every layer of the decoder keys and values, by way of the cache; prompt tuning gives the
first layer embeddings, the encoder's where there is one. Either way the attention mask grows by them and
positions count them; ``generate`` works as ever.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import PatchError, ShapeError

CHILD = "prompt_encoder"  # its name in the model, PEFT's word
_PROMPT = "_fastpeft_prompt"


class PromptEncoder(nn.Module):
    """``num_virtual_tokens`` rows: learned as they are, or ``W_2 tanh(W_1 e + b_1) + b_2`` of learned e.

    Args:
        num_virtual_tokens: n.
        width: of a row, w.
        token_dim: features of e.
        hidden_size: of the MLP between; None for none.
        sets: of n rows; a prompt uses the first alone.
        kind: ``dtype`` and ``device`` of the parameters.
    """

    adapters_enabled = True

    def __init__(
        self,
        num_virtual_tokens: int,
        width: int,
        token_dim: int,
        hidden_size: int | None,
        *,
        sets: int = 1,
        **kind: Any,
    ) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.transform: nn.Sequential | None = None
        if hidden_size is None:
            self.embedding = nn.Embedding(num_virtual_tokens * sets, width, **kind)
            return
        self.embedding = nn.Embedding(num_virtual_tokens, token_dim, **kind)
        self.transform = nn.Sequential(
            nn.Linear(token_dim, hidden_size, **kind), nn.Tanh(), nn.Linear(hidden_size, width, **kind)
        )

    def forward(self) -> Tensor:
        """Return the rows, [n * sets, w]."""
        rows: Tensor = self.embedding.weight
        return rows if self.transform is None else self.transform(rows)


class PrefixEncoder(PromptEncoder):
    """Rows of keys and values: [n, layers * 2 * heads * head_dim], for each layer its key, then its value.

    Args:
        shape: (layers, heads of keys, features of a head).
        is_crossed: whether the decoder stands beside an encoder. PEFT then hands out the rows of two models
            (``num_transformer_submodules=2``) and keeps those of the first: layer l takes the rows of layer
            ``2 l mod layers``, and cross-attention sees none. So do we.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        shape: tuple[int, int, int],
        token_dim: int,
        hidden_size: int | None,
        *,
        is_crossed: bool = False,
        **kind: Any,
    ) -> None:
        layers, heads, head_dim = self.shape = shape
        self.is_crossed = is_crossed
        super().__init__(num_virtual_tokens, layers * 2 * heads * head_dim, token_dim, hidden_size, **kind)

    def fill(self, cache: Any, batch: int, dtype: torch.dtype) -> None:
        """Write keys and values into an empty cache, the same for every row of the batch."""
        layers, heads, head_dim = self.shape
        rows = self().to(dtype)
        states = rows.view(len(rows), layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)
        for layer in range(layers):
            keys, values = states[2 * layer % layers if self.is_crossed else layer]
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)


def attach(model: nn.Module, encoder: PromptEncoder) -> None:
    """Put virtual tokens in front of the model's input."""
    model.add_module(CHILD, encoder)
    if not is_encoder_decoder(model):
        model.register_forward_pre_hook(_prompted, with_kwargs=True)
    elif isinstance(encoder, PrefixEncoder):
        model.register_forward_pre_hook(_prefixed_decoder, with_kwargs=True)
    else:
        # generate() calls the encoder by itself, and the rest with the encoder's output and the tokens' mask.
        model.register_forward_pre_hook(_masked_for_prompt, with_kwargs=True)
        stack = _encoder_of(model)
        stack.__dict__[_PROMPT] = [encoder]  # in a list, so that no module has it a second time
        stack.register_forward_pre_hook(_prompted_encoder, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`, be it half done."""
    model._modules.pop(CHILD, None)
    for module in (model, _encoder_of(model)) if is_encoder_decoder(model) else (model,):
        module.__dict__.pop(_PROMPT, None)
        for identity in [i for i, hook in module._forward_pre_hooks.items() if hook in _HOOKS]:
            del module._forward_pre_hooks[identity]
            module._forward_pre_hooks_with_kwargs.pop(identity, None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _encoder_of(model: nn.Module) -> nn.Module:
    get_encoder: Any = model.get_encoder
    stack: nn.Module = get_encoder()
    return stack


def _prompted(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    encoder: Any = model._modules[CHILD]
    if not encoder.adapters_enabled:
        return None
    given = _named(model, args, kwargs)
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    source = ids if embeddings is None else embeddings
    if not isinstance(source, Tensor):
        raise ShapeError(f"{type(encoder).__name__}: expected input_ids or inputs_embeds, got neither")
    n = encoder.embedding.num_embeddings
    cache = given.get("past_key_values")
    is_first = cache is None or cache.get_seq_length() == 0  # later tokens find the first ones' keys there
    _extend(given, n, prepend=is_first and not isinstance(encoder, PrefixEncoder))
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


def _prefixed_decoder(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Keys and values for a decoder beside an encoder."""
    encoder: Any = model._modules[CHILD]
    if not encoder.adapters_enabled:
        return None
    given = _named(model, args, kwargs)
    names = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids")
    source = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    if source is None:
        kind = type(encoder).__name__
        raise ShapeError(f"{kind}: expected decoder_input_ids, decoder_inputs_embeds or labels, got none")
    n = encoder.embedding.num_embeddings
    _extend(given, n, prepend=False, prefix="decoder_")
    given.pop("cache_position", None)
    cache = given.get("past_key_values")
    if cache is None or cache.get_seq_length() == 0:
        dtype = next(p for name, p in model.named_parameters() if not name.startswith(f"{CHILD}.")).dtype
        given["past_key_values"] = _with_prefix(model, encoder, cache, len(source), dtype)
    return (), given


def _masked_for_prompt(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let the decoder see the prompt in the encoder's output."""
    encoder: Any = model._modules[CHILD]
    given = _named(model, args, kwargs)
    mask = given.get("attention_mask")
    if not encoder.adapters_enabled or mask is None:
        return None
    given["attention_mask"] = _longer(mask, encoder.num_virtual_tokens)
    return (), given


def _prompted_encoder(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Embeddings before an encoder's input."""
    encoder: Any = stack.__dict__[_PROMPT][0]
    if not encoder.adapters_enabled:
        return None
    given = _named(stack, args, kwargs)
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeddings is None):
        kind = type(encoder).__name__
        raise ShapeError(f"{kind}: expected input_ids or inputs_embeds, got neither or both")
    get_embeddings: Any = stack.get_input_embeddings
    rows = get_embeddings()(ids) if embeddings is None else embeddings
    n, mask = encoder.num_virtual_tokens, given.get("attention_mask")
    if mask is not None and mask.shape[-1] == rows.shape[1]:  # not when the whole model was called
        given["attention_mask"] = _longer(mask, n)
    prompt = encoder()[:n].to(rows.dtype).expand(len(rows), -1, -1)
    given.update(input_ids=None, inputs_embeds=torch.cat([prompt, rows], dim=1))
    return (), given


_HOOKS = (_prompted, _prefixed_decoder, _masked_for_prompt, _prompted_encoder)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name."""
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def _longer(mask: Any, n: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(f"virtual tokens: expected an attention_mask [batch, tokens], got {shape}")
    return torch.cat([mask.new_ones(len(mask), n), mask], dim=1)


def _extend(given: dict[str, Any], n: int, *, prepend: bool, prefix: str = "") -> None:
    """Let the mask and the positions count n more tokens before those that are there."""
    mask, positions = given.get(f"{prefix}attention_mask"), given.get(f"{prefix}position_ids")
    if mask is not None:
        given[f"{prefix}attention_mask"] = _longer(mask, n)
    if positions is not None:
        positions = positions + n
        if prepend:
            virtual = torch.arange(n, device=positions.device).expand(len(positions), -1)
            positions = torch.cat([virtual, positions], dim=1)
        given[f"{prefix}position_ids"] = positions


def _with_prefix(model: nn.Module, encoder: PrefixEncoder, cache: Any, batch: int, dtype: torch.dtype) -> Any:
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise PatchError(
            "prefix tuning hands its prefix over in the cache, which activation checkpointing leaves out: "
            "call model.gradient_checkpointing_disable()"
        )
    if cache is None:
        from transformers import DynamicCache, EncoderDecoderCache

        config: Any = model.config
        cache = DynamicCache(config=config)
        if encoder.is_crossed:
            get_decoder: Any = model.get_decoder
            config = get_decoder().config
            cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    encoder.fill(cache.self_attention_cache if encoder.is_crossed else cache, batch, dtype)
    return cache
