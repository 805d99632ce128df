"""The parts of a transformer that are measured alone: one linear, q/k/v, a gated MLP."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """M tokens through linears of K inputs and N outputs."""

    M: int
    K: int
    N: int

    @staticmethod
    def parse(text: str) -> Shape:
        """Read `MxKxN`, for argparse."""
        try:
            M, K, N = (int(word) for word in text.lower().split("x"))
        except ValueError:
            M = K = N = 0
        if min(M, K, N) < 1:
            raise argparse.ArgumentTypeError(
                f"expected MxKxN (tokens x in x out), such as 512x1024x1024, received {text}"
            )
        return Shape(M=M, K=K, N=N)

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}"


class Projection(nn.Module):
    """One linear, K to N."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.proj = nn.Linear(shape.K, shape.N, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., K] to [..., N]."""
        return (self.proj(x),)


class Qkv(nn.Module):
    """q of N outputs, k and v of a quarter of that, as grouped-query attention has them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        few = max(1, shape.N // 4)
        self.q_proj = nn.Linear(shape.K, shape.N, bias=False)
        self.k_proj = nn.Linear(shape.K, few, bias=False)
        self.v_proj = nn.Linear(shape.K, few, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., K] to q, k, v."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Mlp(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`, K to N to K."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.K, shape.N, bias=False)
        self.up_proj = nn.Linear(shape.K, shape.N, bias=False)
        self.down_proj = nn.Linear(shape.N, shape.K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., K]."""
        return cast("Tensor", self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


BLOCKS: dict[str, type[Projection | Qkv | Mlp]] = {"linear": Projection, "qkv": Qkv, "mlp": Mlp}


class Host(nn.Module):
    """A model of one block, so that all libraries find its linears where they look by default."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Any:
        """What the block makes of x."""
        return self.layers[0](x)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A block of a size, in a dtype, on a device."""

    block: str
    """Of `BLOCKS`."""
    shape: Shape
    dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def build(self) -> Host:
        """The frozen block with seeded weights."""
        torch.manual_seed(0)
        host = Host(BLOCKS[self.block](self.shape))
        return host.to(device=self.device, dtype=self.dtype).requires_grad_(False)

    def linears(self) -> list[str]:
        """Paths of the linears in :class:`Host`."""
        with torch.device("meta"):
            block = BLOCKS[self.block](self.shape)
        return [f"layers.0.{name}" for name, _ in block.named_children()]

    def input(self) -> Tensor:
        """x [M, K], a leaf that asks for its gradient."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.shape.M, self.shape.K, generator=generator)
        return x.to(device=self.device, dtype=self.dtype).requires_grad_()
