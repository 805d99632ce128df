"""Tiny random transformers models, the same weights at every call."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def llama(
    dtype: torch.dtype = torch.float32, *, tied: bool = False, hidden: int = 32, intermediate: int = 48
) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).to(dtype).eval()


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))
