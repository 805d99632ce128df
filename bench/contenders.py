"""The training steps compared. Each owns a model of its own and runs one whole step at a time."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.measure import Phases

LEARNING_RATE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What both sides are asked for; everything else stays at PEFT's defaults."""

    rank: int
    """Rank r of the adapters."""
    dora: bool
    """DoRA instead of LoRA."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""

    @property
    def alpha(self) -> int:
        """Twice the rank: a scaling of 2, because a scaling of 1 could be skipped by one side."""
        return 2 * self.rank


class Contender:
    """A model with its batch, its optimiser and the way to run one step."""

    def __init__(self, name: str, model: nn.Module, ids: Tensor, *, embeds: bool = False) -> None:
        self.name = name
        self.model = model
        self.ids = ids
        self._embeds = embeds
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE) if self.trainable else None

    def forward(self) -> Any:
        """The model's output, with `loss` and `logits`."""
        if not self._embeds:
            return self.model(input_ids=self.ids, labels=self.ids)
        # The gradient must reach the bottom: a leaf below the first block asks for it.
        embedding = cast("Any", self.model).get_input_embeddings()
        embeds = embedding(self.ids).detach().requires_grad_()
        return self.model(inputs_embeds=embeds, labels=self.ids)

    def loss(self) -> Tensor:
        """The loss alone, with its graph."""
        return cast("Tensor", self.forward().loss)

    def step(self) -> Phases:
        """One training step; seconds by phase."""
        start = perf_counter()
        loss = self.loss()
        forward = perf_counter()
        torch.autograd.backward(loss)
        backward = perf_counter()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        end = perf_counter()
        return {
            "step": end - start,
            "forward": forward - start,
            "backward": backward - forward,
            "optimizer": end - backward,
        }

    def save(self, folder: Path) -> None:
        """Write the adapters as PEFT's files."""
        if hasattr(self.model, "save_pretrained") and hasattr(self.model, "peft_config"):
            # Without the flag PEFT may ask the hub whether the embedding was resized.
            cast("Any", self.model).save_pretrained(folder, save_embedding_layers=False)
        else:
            import fastpeft

            fastpeft.save(self.model, folder)


def frozen(base: nn.Module, ids: Tensor) -> Contender:
    """The floor: frozen base, forward and the whole input-gradient backward, no adapters, no optimiser."""
    return Contender("frozen", copy.deepcopy(base).requires_grad_(False), ids, embeds=True)


def full(base: nn.Module, ids: Tensor) -> Contender:
    """Full fine-tuning in the base's dtype."""
    return Contender("full", copy.deepcopy(base).requires_grad_(True), ids)


def peft(base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """PEFT with its defaults: fp32 adapters on every linear of the blocks."""
    return Contender(f"peft-{_method(adapter)}", peft_model(copy.deepcopy(base), adapter), ids)


def fastpeft(base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """fastpeft on the same modules, with its defaults."""
    return Contender(f"fastpeft-{_method(adapter)}", fastpeft_model(copy.deepcopy(base), adapter), ids)


def in_place(base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """PEFT's model accelerated in place by fastpeft."""
    import fastpeft

    model = fastpeft.patch(peft_model(copy.deepcopy(base), adapter))
    return Contender(f"inplace-{_method(adapter)}", model, ids)


AdapterBuilder = Callable[[nn.Module, Tensor, Adapter], Contender]
BASELINES: dict[str, Callable[[nn.Module, Tensor], Contender]] = {"frozen": frozen, "full": full}
SIDES: dict[str, AdapterBuilder] = {"peft": peft, "inplace": in_place, "fastpeft": fastpeft}
NAMES = (*BASELINES, *(f"{side}-{method}" for method in ("lora", "dora") for side in SIDES))


def build(name: str, base: nn.Module, ids: Tensor, rank: int) -> Contender:
    """The contender called `name`, on a copy of `base`."""
    if name in BASELINES:
        return BASELINES[name](base, ids)
    side, _, method = name.partition("-")
    return SIDES[side](base, ids, Adapter(rank=rank, dora=method == "dora"))


def peft_model(
    model: nn.Module, adapter: Adapter, target_modules: str | list[str] = "all-linear"
) -> nn.Module:
    """Wrap `model` by `peft.get_peft_model`, with adapters that change its output.

    PEFT starts with B = 0, where a wrong adapter computes the right thing; here B and the magnitude move.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=target_modules,
    )
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute it renamed
        wrapped = cast("nn.Module", get_peft_model(model, config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2 / math.sqrt(adapter.rank))
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return wrapped.train()


def fastpeft_model(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Patch `model` in place."""
    import fastpeft

    config = fastpeft.LoRA(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, use_dora=adapter.dora
    )
    return fastpeft.patch(model, config).train()


def copy_adapters(source: Contender, target: Contender) -> None:
    """Give `target`, fastpeft's or PEFT's, the adapter weights of `source`, through PEFT's files."""
    import fastpeft

    with tempfile.TemporaryDirectory() as folder:
        source.save(Path(folder))
        if hasattr(target.model, "peft_config"):
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(target.model, load_file(Path(folder) / "adapter_model.safetensors"))
        else:
            fastpeft.load(target.model, folder)


def _method(adapter: Adapter) -> str:
    return "dora" if adapter.dora else "lora"
