"""Small modules whose linears belong together, under names that no list would hold."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, WIDE = 12, 20


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(HIDDEN, HIDDEN)
        self.to_k = nn.Linear(HIDDEN, HIDDEN // 2)
        self.to_v = nn.Linear(HIDDEN, HIDDEN // 2)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, other=None):
        q = self.to_q(x)
        if other is not None:
            return q + self.to_k(other).sum() + self.to_v(other).sum()
        k, v = (self.to_k(x), self.to_v(x))
        x = q * torch.cat([k, v], dim=-1)
        return self.out(x)


class Mlp(nn.Module):
    def __init__(self, factor: float = 1.0, activation=F.silu, swap: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(HIDDEN, WIDE, bias=False), nn.Linear(HIDDEN, WIDE, bias=False)
        self.back = nn.Linear(WIDE, HIDDEN, bias=False)
        self.factor, self.activation, self.swap = factor, activation, swap

    def forward(self, x):
        a, b = (self.two(x), self.one(x)) if self.swap else (self.one(x), self.two(x))
        return self.back(self.activation(a) * b) * self.factor


class FusedMlp(nn.Module):
    """Gate and up are the halves of one linear's output, gate first or second."""

    def __init__(self, activation=F.silu, gate_first: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.both = nn.Linear(HIDDEN, 2 * WIDE, bias=bias)
        self.back = nn.Linear(WIDE, HIDDEN, bias=bias)
        self.activation, self.gate_first = activation, gate_first

    def forward(self, x):
        first, second = self.both(x).chunk(2, dim=-1)
        if self.gate_first:
            return self.back(second * self.activation(first))
        return self.back(self.activation(second) * first)


class FusedAttention(nn.Module):
    """q, k and v are parts of one linear's output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        qkv = self.qkv(x)
        return self.out(qkv[..., :HIDDEN] * qkv[..., HIDDEN:])


def blocks(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*copy.deepcopy(layers))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model
