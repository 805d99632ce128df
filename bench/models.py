"""The models measured. Weights are random: the time of a step does not depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A Llama-shaped model, with experts for its MLPs if wished, and the batch it is trained on."""

    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width of the MLP; of one expert, where there are some."""
    layers: int
    """Number of blocks."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    vocab: int
    """Size of the vocabulary."""
    tied: bool
    """Whether the output layer shares the embedding's weight."""
    batch: int
    """Sequences a step."""
    sequence: int
    """Tokens a sequence."""
    experts: int = 0
    """Experts of each MLP, stacked in one weight as transformers stacks them; 0: none."""
    experts_per_token: int = 0
    """How many of them a token takes."""

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.sequence

    def build(
        self,
        dtype: torch.dtype,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        biases: bool = False,
    ) -> nn.Module:
        """The model with seeded random weights, in training mode; with biases on its linears if wished."""
        from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

        kind, make = (
            (Qwen3MoeConfig, Qwen3MoeForCausalLM) if self.experts else (LlamaConfig, LlamaForCausalLM)
        )
        own = (
            {
                "num_experts": self.experts,
                "num_experts_per_tok": self.experts_per_token,
                "moe_intermediate_size": self.intermediate,
                "head_dim": self.hidden // self.heads,
            }
            if self.experts
            else {"mlp_bias": biases}
        )
        config = kind(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=max(2048, self.sequence),
            use_cache=False,
            attention_bias=biases,
            bos_token_id=0,
            eos_token_id=0,
            **own,
        )
        torch.manual_seed(seed)
        return cast("nn.Module", make(config).to(device=device, dtype=dtype).train())

    def batch_ids(self, *, seed: int = 0, device: torch.device | None = None) -> Tensor:
        """Random token ids [batch, sequence], also used as labels."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.vocab, (self.batch, self.sequence), generator=generator).to(device)


WORKLOADS = {
    "llama-768": Workload(
        hidden=768, intermediate=2048, layers=4, heads=12, kv_heads=12, vocab=32000, tied=False,
        batch=1, sequence=512,
    ),
    # The shape of HuggingFaceTB/SmolLM2-135M.
    "smollm2-135m": Workload(
        hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocab=49152, tied=True,
        batch=2, sequence=256,
    ),
    # Llama-2-7B, for `patch`, which makes it on the meta device.
    "llama-2-7b": Workload(
        hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocab=32000, tied=False,
        batch=1, sequence=1024,
    ),
    # Fine-grained experts in Qwen3-MoE's shape: `step --contenders frozen full peft-lora inplace-lora`.
    "moe-512": Workload(
        hidden=512, intermediate=384, layers=4, heads=8, kv_heads=2, vocab=8192, tied=True,
        batch=1, sequence=512, experts=32, experts_per_token=4,
    ),
    # For the tests: a whole run takes a second. Its times say nothing.
    "tiny": Workload(
        hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocab=128, tied=True,
        batch=2, sequence=24,
    ),
}  # fmt: skip

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
