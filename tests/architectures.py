"""A tiny random model of every architecture that is promised, and its inputs: seeded, built in no time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

VOCABULARY, HIDDEN, LAYERS = 64, 32, 2
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}


def _ids(seed: int = 3) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))


def _pixels(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def text() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def text_to_text() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(4)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": _pixels()}


def image_and_text() -> dict[str, Tensor]:
    """A text's features are those of its end, the largest id: the first token attends to nothing."""
    ids = _ids()
    ids[:, -1] = VOCABULARY - 1
    return {"input_ids": ids, "pixel_values": _pixels()}


def speech() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, "decoder_input_ids": _ids(4)}


def _make(model: Any, config: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = model(config(**{**SPECIAL, **options})).float().eval()
    return made


def _decoder(name: str, **options: Any) -> Callable[[], nn.Module]:
    model, config = getattr(t, f"{name}ForCausalLM"), getattr(t, f"{name}Config")
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return partial(_make, model, config, **{**sizes, **options})


def _gemma3() -> nn.Module:
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    return _make(t.Gemma3ForCausalLM, t.Gemma3TextConfig, **sizes)


def _clip() -> nn.Module:
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = t.CLIPConfig(
        text_config={**sizes, **SPECIAL, "vocab_size": VOCABULARY, "projection_dim": 16},
        vision_config={**sizes, "image_size": 16, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    return t.CLIPModel(config).eval()


_VISION = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}

# Name: (model, inputs).
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (_decoder("Llama"), text),
    "mistral": (_decoder("Mistral"), text),
    "qwen2": (_decoder("Qwen2"), text),
    "qwen3": (_decoder("Qwen3", head_dim=8), text),
    "gemma2": (_decoder("Gemma2", head_dim=8, query_pre_attn_scalar=8), text),
    "gemma3": (_gemma3, text),
    "phi3": (_decoder("Phi3"), text),
    "gpt2": (
        partial(
            _make, t.GPT2LMHeadModel, t.GPT2Config, n_layer=2, n_embd=32, n_head=4, vocab_size=VOCABULARY
        ),
        text,
    ),
    "gpt-neox": (_decoder("GPTNeoX"), text),
    "falcon": (partial(_make, t.FalconForCausalLM, t.FalconConfig, **SIZES), text),
    "opt": (_decoder("OPT", ffn_dim=48, word_embed_proj_dim=HIDDEN), text),
    "bloom": (
        partial(
            _make, t.BloomForCausalLM, t.BloomConfig, hidden_size=HIDDEN, n_layer=2, n_head=4, vocab_size=64
        ),
        text,
    ),
    "mixtral": (_decoder("Mixtral", num_local_experts=4), text),
    "qwen2-moe": (
        _decoder(
            "Qwen2Moe",
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        text,
    ),
    "t5": (
        partial(
            _make,
            t.T5ForConditionalGeneration,
            t.T5Config,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            vocab_size=VOCABULARY,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        text_to_text,
    ),
    "bert": (partial(_make, t.BertForMaskedLM, t.BertConfig, **_ENCODER), text),
    "roberta": (partial(_make, t.RobertaForMaskedLM, t.RobertaConfig, **_ENCODER), text),
    "deberta": (  # one in_proj for q, k and v
        partial(
            _make,
            t.DebertaForMaskedLM,
            t.DebertaConfig,
            **_ENCODER,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
        ),
        text,
    ),
    "deberta-v2": (partial(_make, t.DebertaV2ForMaskedLM, t.DebertaV2Config, **_ENCODER), text),
    "vit": (partial(_make, t.ViTForImageClassification, t.ViTConfig, **_VISION, intermediate_size=48), image),
    "dinov2": (partial(_make, t.Dinov2ForImageClassification, t.Dinov2Config, **_VISION, mlp_ratio=2), image),
    "clip": (_clip, image_and_text),
    "whisper": (
        partial(
            _make,
            t.WhisperForConditionalGeneration,
            t.WhisperConfig,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=16,
            decoder_start_token_id=1,
        ),
        speech,
    ),
    "mamba": (
        partial(
            _make,
            t.MambaForCausalLM,
            t.MambaConfig,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            state_size=4,
            vocab_size=VOCABULARY,
        ),
        text,
    ),
}
