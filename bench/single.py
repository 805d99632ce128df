"""One block as each contender has it, for the suites `layers` and `memory`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import adapter_files, contenders, gpu_peers, parity, peer_linears
from bench.adapter import Adapter
from bench.blocks import Problem, Shape

__all__ = ["Shape"]  # where `traffic` takes it from

Forward = Callable[[Tensor], Any]


class Layer:
    """A contender's block, its input and its outputs' gradients."""

    def __init__(self, call: Forward, root: nn.Module, x: Tensor) -> None:
        self.call = call
        self.root = root
        self.x = x
        self.trainable = [p for p in root.parameters() if p.requires_grad]
        self.dys: tuple[Tensor, ...] = ()

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs: one, or q, k and v."""
        result = self.call(self.x)
        return result if isinstance(result, tuple) else (result,)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """Backward from seeded gradients of the outputs, the same for every contender."""
        if not self.dys:
            generator = torch.Generator().manual_seed(3)
            self.dys = tuple(torch.randn(y.shape, generator=generator).to(y) for y in outputs)
        torch.autograd.backward(outputs, self.dys)

    def clear(self) -> None:
        """Drop the gradients, and mark the adapters as written, as an optimiser step would do.

        Otherwise a DoRA norm kept from the last call could be used again, which no training step can do.
        """
        self.x.grad = None
        with torch.no_grad():
            for parameter in self.trainable:
                parameter.grad = None
                parameter.mul_(1)

    def save(self, folder: Path) -> None:
        """Write the adapter as PEFT's files."""
        adapter_files.save(self.root, folder)

    def outcome(self) -> parity.Outcome:
        """Outputs and gradients, for the parity gate."""
        self.clear()
        outputs = self.forward()
        self.backward(outputs)
        assert self.x.grad is not None
        gradient = self.x.grad
        groups = parity.gradients(self.trainable, self.save)
        groups |= {"output": {f"y{i}": y.detach() for i, y in enumerate(outputs)}}
        groups |= {"gradient of x": {"x": gradient}}
        self.clear()
        return parity.Outcome(groups=groups)


def frozen(problem: Problem) -> Layer:
    """The frozen block alone."""
    root = problem.build()
    return Layer(root.layers[0], root, problem.input())


def peft(problem: Problem, adapter: Adapter, wide: torch.dtype | None = None) -> Layer:
    """PEFT's block; in `wide`, if given, on the same weights and inputs."""
    root, x = _peft_root(problem, adapter), problem.input()
    if wide is not None:
        root.to(wide)
        x = x.detach().to(wide).requires_grad_()
    return Layer(_block(root), root, x)


def peft_compiled(problem: Problem, adapter: Adapter) -> Layer:
    """PEFT's block under `torch.compile`."""
    root = _peft_root(problem, adapter)
    torch._dynamo.reset()
    _block(root).compile(dynamic=False)
    return Layer(_block(root), root, problem.input())


def in_place(problem: Problem, adapter: Adapter) -> Layer:
    """PEFT's block accelerated in place by fastpeft."""
    import fastpeft as library

    root = library.patch(_peft_root(problem, adapter))
    return Layer(_block(root), root, problem.input())


def fastpeft(problem: Problem, adapter: Adapter) -> Layer:
    """fastpeft's block, with the adapters of `peft`'s."""
    root = contenders.fastpeft_model(problem.build(), adapter)
    adapter_files.copy(_peft_root(problem, adapter), root)
    return Layer(_block(root), root, problem.input())


def peer(name: str, problem: Problem, adapter: Adapter) -> Layer:
    """The block with another library's linears, with the adapters of `peft`'s."""
    if reason := peer_linears.missing(name, adapter.method):
        raise RuntimeError(reason)
    root = peer_linears.install(problem.build(), name, adapter, problem.linears())
    adapter_files.copy(_peft_root(problem, adapter), root)
    return Layer(_block(root), root, problem.input())


def gpu_peer(name: str, problem: Problem, adapter: Adapter) -> Layer:
    """PEFT's block with another library's fused functions on it."""
    root = _peft_root(problem, adapter)
    return Layer(gpu_peers.forward_of(name, problem.block, _block(root), adapter), root, problem.input())


Builder = Callable[[Problem, Adapter], Layer]
OURS: dict[str, Builder] = {"peft": peft, "inplace": in_place, "fastpeft": fastpeft}
PEERS: dict[str, Builder] = {
    **{name: partial(peer, name) for name in peer_linears.PEERS},
    "peft-compiled": peft_compiled,
    **{name: partial(gpu_peer, name) for name in gpu_peers.LAYER_PEERS},
}


def missing(side: str, method: str, device: torch.device) -> str | None:
    """Why a side cannot run here, or None."""
    if side in peer_linears.PEERS:
        return peer_linears.missing(side, method)
    return gpu_peers.missing(side, method, device) if side in gpu_peers.LAYER_PEERS else None


def check(layer: Layer, problem: Problem, adapter: Adapter) -> list[parity.Check]:
    """Compare `layer` with PEFT's, both against PEFT's in a wider dtype."""
    reference, pefts = _yardstick(problem, adapter)
    return parity.compare(reference, pefts, layer.outcome(), problem.dtype)


@lru_cache(maxsize=2)  # LoRA's and DoRA's of one case, whose contenders all ask for it
def _yardstick(problem: Problem, adapter: Adapter) -> tuple[parity.Outcome, parity.Outcome]:
    """PEFT's outcome in a wider dtype, and in the problem's own."""
    wide = peft(problem, adapter, wide=parity.wider(problem.dtype)).outcome()
    return wide, peft(problem, adapter).outcome()


def _peft_root(problem: Problem, adapter: Adapter) -> nn.Module:
    names = [path.rpartition(".")[2] for path in problem.linears()]
    return contenders.peft_model(problem.build(), adapter, target_modules=names)


def _block(root: Any) -> nn.Module:
    model = root.base_model.model if hasattr(root, "peft_config") else root
    return model.layers[0]  # type: ignore[no-any-return]
