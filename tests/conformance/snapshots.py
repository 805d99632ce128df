"""Tiny random stand-ins for the hub's models that PEFT's tests name, in the layout of the hub's cache.

The tests then run without a network: what they ask for by name is found where a download would have put it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

REVISION = "0" * 40
RECIPE = 3  # another number makes the models anew where an older one is in the cache
VOCABULARY = 1024
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
# PEFT's tests use token 1. As padding its embedding would be zeros, which stay zeros through every layer of a
# model without biases, whatever an adapter does; on the hub these have none, or another.
_GATED = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 4, "pad_token_id": None}
_EXPERTS = {"num_local_experts": 4}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
_OPT = {**_SIZES, "ffn_dim": 4, "word_embed_proj_dim": 16, "num_hidden_layers": 5, "pad_token_id": 1}
_ENCODER = {**_SIZES, "intermediate_size": 37}
_WIDER = {**_ENCODER, "hidden_size": 32}  # no narrower than the ranks that its tests combine
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "max_position_embeddings": 100,
}

# Name on the hub: (model class, configuration class, its values).
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (t.OPTForCausalLM, t.OPTConfig, _OPT),
    "peft-internal-testing/opt-125m": (
        t.OPTForCausalLM,
        t.OPTConfig,
        # PEFT's tests know its width.
        {**_OPT, "num_hidden_layers": 12, "hidden_size": 768, "word_embed_proj_dim": 768},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (t.GPT2LMHeadModel, t.GPT2Config, _GPT2),
    "peft-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, t.GPT2Config, _GPT2),
    "hf-internal-testing/tiny-random-gpt2": (t.GPT2LMHeadModel, t.GPT2Config, _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        t.GPTJForCausalLM,
        t.GPTJConfig,
        {**_GPT2, "rotary_dim": 4, "n_inner": 37},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, _ENCODER),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        t.BloomForCausalLM,
        t.BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig, _GATED),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig, _GATED),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (t.LlamaForCausalLM, t.LlamaConfig, _GATED),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        t.Llama4ForCausalLM,
        t.Llama4TextConfig,
        {**_GATED, **_EXPERTS, "head_dim": 4, "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        t.GptOssForCausalLM,
        t.GptOssConfig,
        # Positions as they are: its own stretched ones are for 131,072 of them.
        {
            **_GATED,
            **_EXPERTS,
            "head_dim": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (t.MistralForCausalLM, t.MistralConfig, _GATED),
    "peft-internal-testing/tiny-dummy-qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, _GATED),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (
        t.Qwen3ForCausalLM,
        t.Qwen3Config,
        {**_GATED, "head_dim": 4},
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        t.Gemma3ForCausalLM,
        t.Gemma3TextConfig,
        {**_GATED, "head_dim": 8, "pad_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BertModel": (t.BertModel, t.BertConfig, _ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": (t.RobertaModel, t.RobertaConfig, _ENCODER),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        t.RobertaForSequenceClassification,
        t.RobertaConfig,
        _ENCODER,
    ),
    "peft-internal-testing/tiny-random-DebertaModel": (t.DebertaModel, t.DebertaConfig, _WIDER),
    "peft-internal-testing/tiny-random-DebertaV2Model": (t.DebertaV2Model, t.DebertaV2Config, _ENCODER),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (
        t.T5ForConditionalGeneration,
        t.T5Config,
        {**_T5, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        t.T5ForConditionalGeneration,
        t.T5Config,
        {**_T5, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-t5": (
        t.T5ForConditionalGeneration,
        t.T5Config,
        {**_T5, "decoder_start_token_id": 0},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        t.BartForConditionalGeneration,
        t.BartConfig,
        {**_BART, "decoder_start_token_id": 1},
    ),
}
# PEFT's tests divide by the embeddings of these, padding's too.
TRAINED_PADDING = ("peft-internal-testing/opt-125m",)


def fill(home: Path) -> None:
    """Make what is missing below ``home``, which becomes ``HF_HOME``."""
    for name, (model, config, values) in MODELS.items():
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        # Larger weights than a training starts with: PEFT's tests look for adapters' effects in the output.
        values = {**SPECIAL, "initializer_range": 0.2, **values}
        recipe = f"{RECIPE} {model.__name__} {sorted(values.items())} {t.__version__}"
        complete = snapshot / "complete"
        if complete.exists() and complete.read_text() == recipe:
            continue
        shutil.rmtree(snapshot, ignore_errors=True)
        torch.manual_seed(0)
        whole = model(config(**values))
        if name in TRAINED_PADDING:
            _fill_padding(whole, values["initializer_range"])
        whole.save_pretrained(snapshot)
        _tokenizer().save_pretrained(snapshot)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(REVISION)
        complete.write_text(recipe)


def _fill_padding(model: torch.nn.Module, deviation: float) -> None:
    """Give a padding token's embedding numbers, as a model that was trained has them."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.normal_(module.weight.data[module.padding_idx], std=deviation)


def _tokenizer() -> t.PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
