"""The training steps compared. Each owns a model of its own and runs one whole step at a time."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench import adapter_files, gpu_peers, peak, peer_linears, saved
from bench.adapter import Adapter
from bench.clock import Stopwatch
from bench.measure import Phases
from fastpeft.planning.optimizers import tensors_in

LEARNING_RATE = 1e-5


class Contender:
    """A model with its batch, its optimiser and the way to run one step."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        ids: Tensor,
        *,
        embeds: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.ids = ids
        self._embeds = embeds
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if optimizer is None and self.trainable:
            optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE)
        self.optimizer = optimizer

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
        watch = Stopwatch(self.ids.device)
        loss = self.loss()
        watch.mark("forward")
        torch.autograd.backward(loss)
        watch.mark("backward")
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        watch.mark("optimizer")
        return watch.phases("step")

    def save(self, folder: Path) -> None:
        """Write the adapters as PEFT's files."""
        adapter_files.save(self.model, folder)

    def saved_bytes(self) -> int:
        """Bytes one forward pass keeps for backward, parameters and buffers apart."""
        with saved.SavedBytes(saved.state_of(self.model)) as counter:
            loss = self.loss()
        count = counter.bytes()
        del loss
        return count

    def step_bytes(self, steps: int = 1) -> tuple[int, int]:
        """The most bytes alive during `steps` steps, of all tensors, and of moments after any of them.

        All: weights, gradients, moments, activations. One step goes before, so that moments are there.
        """
        self.step()
        # The list must not outlive the call: a schedule drops moments, and they are to go.
        with peak.PeakBytes([*saved.state_of(self.model), *self._moments(), self.ids]) as counter:
            moments = []
            for _ in range(steps):
                self.step()
                moments.append(self._moments_bytes())
        return counter.peak, max(moments)

    def _moments_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._moments() if tensor.dim())

    def _moments(self) -> list[Tensor]:
        states = [] if self.optimizer is None else self.optimizer.state.values()
        return [tensor for state in states for value in state.values() for tensor in tensors_in(value)]


def frozen(base: nn.Module, ids: Tensor) -> Contender:
    """The floor: frozen base, forward and the whole input-gradient backward, no adapters, no optimiser."""
    return Contender("frozen", copy.deepcopy(base).requires_grad_(False), ids, embeds=True)


def full(base: nn.Module, ids: Tensor) -> Contender:
    """Full fine-tuning in the base's dtype."""
    return Contender("full", copy.deepcopy(base).requires_grad_(True), ids)


def peft(base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """PEFT with its defaults: fp32 adapters on every linear of the blocks."""
    return Contender(f"peft-{adapter.method}", peft_model(copy.deepcopy(base), adapter), ids)


def fastpeft(base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """fastpeft on the same modules, with its defaults."""
    return Contender(f"fastpeft-{adapter.method}", fastpeft_model(copy.deepcopy(base), adapter), ids)


def in_place(base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """PEFT's model accelerated in place by fastpeft."""
    import fastpeft

    model = fastpeft.patch(peft_model(copy.deepcopy(base), adapter))
    return Contender(f"inplace-{adapter.method}", model, ids)


def peft_compiled(base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """PEFT's model under `torch.compile`."""
    model = peft_model(copy.deepcopy(base), adapter)
    model.compile(dynamic=False)
    return Contender(f"peft-compiled-{adapter.method}", model, ids)


def liger(base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """PEFT's model with Liger's RMSNorm, SwiGLU and loss around its layers."""
    if reason := gpu_peers.missing("liger", adapter.method, ids.device):
        raise RuntimeError(reason)
    model = peft_model(gpu_peers.apply_liger(copy.deepcopy(base)), adapter)
    return Contender(f"liger-{adapter.method}", model, ids)


def peer(name: str, base: nn.Module, ids: Tensor, adapter: Adapter) -> Contender:
    """The model with another library's linears inside its blocks."""
    if reason := peer_linears.missing(name, adapter.method):
        raise RuntimeError(reason)
    model = copy.deepcopy(base)
    paths = [path for path, module in model.named_modules()
             if isinstance(module, nn.Linear) and ".layers." in path]  # fmt: skip
    return Contender(f"{name}-{adapter.method}", peer_linears.install(model, name, adapter, paths), ids)


AdapterBuilder = Callable[[nn.Module, Tensor, Adapter], Contender]
BASELINES: dict[str, Callable[[nn.Module, Tensor], Contender]] = {"frozen": frozen, "full": full}
SIDES: dict[str, AdapterBuilder] = {"peft": peft, "inplace": in_place, "fastpeft": fastpeft}
PEERS: dict[str, AdapterBuilder] = {
    **{name: partial(peer, name) for name in peer_linears.PEERS},
    "peft-compiled": peft_compiled,
    "liger": liger,
}
METHODS = ("lora", "dora")
NAMES = (*BASELINES, *(f"{side}-{method}" for method in METHODS for side in SIDES))
PEER_NAMES = tuple(f"{side}-{method}" for method in METHODS for side in PEERS)


def missing(name: str, device: torch.device) -> str | None:
    """Why the contender `name` cannot run here, or None."""
    side, _, method = name.rpartition("-")
    if side in peer_linears.PEERS:
        return peer_linears.missing(side, method)
    return gpu_peers.missing(side, method, device) if side == "liger" else None


def build(name: str, base: nn.Module, ids: Tensor, rank: int) -> Contender:
    """The contender called `name`, on a copy of `base`."""
    if name in BASELINES:
        return BASELINES[name](base, ids)
    side, _, method = name.rpartition("-")
    builder = (SIDES | PEERS)[side]
    return builder(base, ids, Adapter(rank=rank, dora=method == "dora"))


def peft_model(
    model: nn.Module, adapter: Adapter, target_modules: str | list[str] = "all-linear"
) -> nn.Module:
    """Wrap `model` by `peft.get_peft_model`, with adapters that change its output; on stacked experts too.

    PEFT starts with B = 0, where a wrong adapter computes the right thing; here B and the magnitude move.
    """
    from peft import LoraConfig, get_peft_model

    stacks = {
        name.split(".layers.")[-1].partition(".")[2] for name, p in model.named_parameters() if p.dim() == 3
    }
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=target_modules,
        target_parameters=sorted(stacks) or None,
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
            if "lora_" in name:
                # Exact in 16 bits too, where some peers keep their adapters: all start from the same numbers.
                parameter.copy_(parameter.bfloat16())
    return wrapped.train()


def fastpeft_model(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Patch `model` in place."""
    import fastpeft

    config = fastpeft.LoRA(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, use_dora=adapter.dora
    )
    return fastpeft.patch(model, config).train()
