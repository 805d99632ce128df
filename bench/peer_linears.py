"""Other libraries' LoRA and DoRA linears, in the place of a model's own: torchtune, loralib, plain PyTorch.

They keep their adapters in the base's dtype, as these libraries do (`plain` keeps them in fp32, as PEFT
does). `parts` gives their parameters the names that PEFT's file has for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bench.adapter import Adapter

MARK = "_bench_peer"
Parts = dict[str, nn.Parameter]


class PlainLinear(nn.Module):
    """The formula as anyone would write it: `x W^T + s (x A^T) B^T`, for DoRA times `m / ||W + s B A||`."""

    def __init__(self, base: nn.Linear, adapter: Adapter) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scaling = adapter.alpha / adapter.rank
        self.dropout = nn.Dropout(adapter.dropout) if adapter.dropout else nn.Identity()
        options: Any = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(adapter.rank, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, adapter.rank, **options))
        self.magnitude = nn.Parameter(torch.empty(base.out_features, **options)) if adapter.dora else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        dropped = self.dropout(x)
        low_rank = self.scaling * linear(linear(dropped, A), B)
        if self.magnitude is None:
            return linear(x, self.weight, self.bias) + low_rank
        with torch.no_grad():
            norm = (self.weight.float() + self.scaling * self.lora_B @ self.lora_A).norm(dim=1)
        y: Tensor = (self.magnitude / norm).to(x.dtype) * (linear(dropped, self.weight) + low_rank)
        return y if self.bias is None else y + self.bias


def _plain_parts(module: Any) -> Parts:
    found = {"lora_A.weight": module.lora_A, "lora_B.weight": module.lora_B}
    return found if module.magnitude is None else found | {"lora_magnitude_vector": module.magnitude}


def _torchtune(base: nn.Linear, adapter: Adapter) -> nn.Module:
    from torchtune.modules.peft import DoRALinear, LoRALinear

    kind = DoRALinear if adapter.dora else LoRALinear
    module: Any = kind(base.in_features, base.out_features, rank=adapter.rank, alpha=float(adapter.alpha),
                       dropout=adapter.dropout, use_bias=base.bias is not None)  # fmt: skip
    module.to(device=base.weight.device, dtype=base.weight.dtype)
    module.weight, module.bias = base.weight, base.bias
    return module  # type: ignore[no-any-return]


def _torchtune_parts(module: Any) -> Parts:
    found = {"lora_A.weight": module.lora_a.weight, "lora_B.weight": module.lora_b.weight}
    return found | {"lora_magnitude_vector": module.magnitude} if hasattr(module, "magnitude") else found


def _loralib(base: nn.Linear, adapter: Adapter) -> nn.Module:
    import loralib

    module: Any = loralib.Linear(base.in_features, base.out_features, r=adapter.rank,
                                 lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
                                 bias=base.bias is not None)  # fmt: skip
    module.to(device=base.weight.device, dtype=base.weight.dtype)
    module.weight, module.bias = base.weight, base.bias
    return module  # type: ignore[no-any-return]


def _loralib_parts(module: Any) -> Parts:
    return {"lora_A.weight": module.lora_A, "lora_B.weight": module.lora_B}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerLinear:
    """A library's linear: how one is made in the place of an `nn.Linear`, and what its parameters are."""

    package: str | None
    """What must be importable; None for what needs nothing."""
    methods: tuple[str, ...]
    """Of `lora` and `dora`, those it has."""
    make: Callable[[nn.Linear, Adapter], nn.Module]
    parts: Callable[[Any], Parts]


PEERS = {
    "plain": PeerLinear(package=None, methods=("lora", "dora"), make=PlainLinear, parts=_plain_parts),
    "torchtune": PeerLinear(
        package="torchtune.modules.peft", methods=("lora", "dora"), make=_torchtune, parts=_torchtune_parts
    ),
    "loralib": PeerLinear(package="loralib", methods=("lora",), make=_loralib, parts=_loralib_parts),
}


def missing(name: str, method: str) -> str | None:
    """Why a peer cannot run here, or None."""
    peer = PEERS[name]
    if method not in peer.methods:
        return f"{name} has no {'DoRA' if method == 'dora' else 'LoRA'}"
    return import_failure(peer.package) if peer.package else None


def import_failure(package: str) -> str | None:
    """Why a package cannot be imported, or None; without a GPU some raise more than ImportError."""
    try:
        importlib.import_module(package)
    except Exception as error:
        return f"import {package.partition('.')[0]}: {type(error).__name__}: {error}".splitlines()[0]
    return None


def install(model: nn.Module, name: str, adapter: Adapter, paths: Sequence[str]) -> nn.Module:
    """Put the peer's linears in the place of the `nn.Linear`s at `paths`; only their adapters train."""
    peer = PEERS[name]
    model.requires_grad_(False)
    for path in paths:
        parent, _, child = path.rpartition(".")
        base = model.get_submodule(path)
        if not isinstance(base, nn.Linear):
            raise TypeError(f"{path}: expected an nn.Linear, found {type(base).__name__}")
        module = peer.make(base, adapter)
        module.train()  # loralib's returns nothing
        module.requires_grad_(False)
        for parameter in peer.parts(module).values():
            parameter.requires_grad_(True)
        setattr(module, MARK, name)
        setattr(model.get_submodule(parent), child, module)
    return model


def parts(model: nn.Module) -> Parts:
    """The adapters of all peers' linears in `model` by PEFT's file key; nothing where there is none."""
    found: Parts = {}
    for path, module in model.named_modules():
        if name := getattr(module, MARK, None):
            for part, parameter in PEERS[name].parts(module).items():
                found[f"base_model.model.{path}.{part}"] = parameter
    return found
