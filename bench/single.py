"""One linear layer as each contender has it, for the suites `layers` and `memory`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench import contenders, parity
from bench.contenders import Adapter


class Host(nn.Module):
    """A model of one block with one linear, so that both libraries find it where they look by default."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        block = nn.Module()
        block.proj = linear
        self.layers = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return cast("Tensor", cast("Any", self.layers[0]).proj(x))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """M tokens through a linear of K inputs and N outputs."""

    M: int
    K: int
    N: int

    @staticmethod
    def parse(text: str) -> Shape:
        """Read `MxKxN`, for argparse."""
        M, K, N = (int(word) for word in text.lower().split("x"))
        if min(M, K, N) < 1:
            raise ValueError(text)
        return Shape(M=M, K=K, N=N)

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}"


class Layer:
    """A contender's linear, its input and its output gradient."""

    def __init__(self, call: nn.Module, root: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.call = call
        self.root = root
        self.x = x
        self.dy = dy
        self.trainable = [p for p in root.parameters() if p.requires_grad]

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
        if hasattr(self.root, "peft_config"):
            cast("Any", self.root).save_pretrained(folder, save_embedding_layers=False)
        else:
            import fastpeft

            fastpeft.save(self.root, folder)

    def outcome(self) -> parity.Outcome:
        """Output and gradients, for the parity gate."""
        self.clear()
        y = self.call(self.x)
        torch.autograd.backward(y, self.dy)
        assert self.x.grad is not None
        gradient = self.x.grad
        groups = parity.gradients(self.trainable, self.save)
        groups |= {"output": {"y": y.detach()}, "gradient of x": {"x": gradient}}
        self.clear()
        return parity.Outcome(groups=groups)


def _layer(call: nn.Module, root: nn.Module, shape: Shape, dtype: torch.dtype) -> Layer:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape.M, shape.K, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(shape.M, shape.N, generator=generator).to(dtype)
    return Layer(call, root, x, dy)


def _linear(shape: Shape, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(shape.K, shape.N, bias=False).to(dtype).requires_grad_(False)


def frozen(shape: Shape, dtype: torch.dtype) -> Layer:
    """The frozen linear alone."""
    linear = _linear(shape, dtype)
    return _layer(linear, linear, shape, dtype)


def peft(shape: Shape, dtype: torch.dtype, adapter: Adapter, wide: torch.dtype | None = None) -> Layer:
    """PEFT's layer; in `wide`, if given, on the same weights and inputs."""
    root = contenders.peft_model(Host(_linear(shape, dtype)), adapter, target_modules=["proj"])
    layer = _layer(cast("Any", root).base_model.model.layers[0].proj, root, shape, dtype)
    if wide is None:
        return layer
    root.to(wide)
    x = layer.x.detach().to(wide).requires_grad_()
    return Layer(layer.call, root, x, layer.dy.to(wide))


def fastpeft(shape: Shape, dtype: torch.dtype, adapter: Adapter) -> Layer:
    """fastpeft's layer, with the adapter of `peft`'s."""
    import fastpeft as library

    root = contenders.fastpeft_model(Host(_linear(shape, dtype)), adapter)
    with tempfile.TemporaryDirectory() as folder:
        peft(shape, dtype, adapter).save(Path(folder))
        library.load(root, folder)
    return _layer(cast("Any", root).layers[0].proj, root, shape, dtype)


Builder = Callable[[Shape, torch.dtype, Adapter], Layer]
SIDES: dict[str, Builder] = {"peft": peft, "fastpeft": fastpeft}


def check(layer: Layer, shape: Shape, dtype: torch.dtype, adapter: Adapter) -> list[parity.Check]:
    """Compare `layer` with PEFT's, both against PEFT's in a wider dtype."""
    reference = peft(shape, dtype, adapter, wide=parity.wider(dtype)).outcome()
    return parity.compare(reference, peft(shape, dtype, adapter).outcome(), layer.outcome(), dtype)
