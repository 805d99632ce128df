"""One linear layer for `bench traffic`: what its training step calls, its limits and its peers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bench import report
from bench.peers import PEERS, PUBLISHED, PUBLISHED_AT, TARGETS, Formula, limit
from bench.single import Shape

if TYPE_CHECKING:
    from bench.launch_traffic import Operand, Pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One linear layer: its sizes (M tokens, K in, N out), the rank and the dropout in front of A.

    With a bias DoRA's forward keeps z for dm, as it does in fp16 without one; `table` has the tiles.
    """

    shape: Shape
    rank: int
    dropout: float
    bias: bool = False
    table: str = "sm_90"

    def title(self) -> str:
        """As it stands above its tables."""
        bias = ", bias" if self.bias else ""
        return f"{self.shape} (tokens x in x out), bf16, r={self.rank}, dropout {self.dropout:g}{bias}"

    def about(self) -> report.Record:
        """What a record says of it."""
        about = {"shape": str(self.shape), "rank": self.rank, "dropout": self.dropout}
        return {**about, "bias": True} if self.bias else about

    def is_wide(self, operand: Operand) -> bool:
        """Whether a tensor of these dimensions is as large as x, W or y."""
        m, n, k = self.shape.M, self.shape.N, self.shape.K
        return sorted(operand.shape) in (sorted((m, k)), sorted((n, k)), sorted((m, n)))

    def moved(self, formula: Formula) -> float:
        """A formula's bytes for this layer."""
        return formula.bytes(self.shape.M, self.shape.N, self.shape.K)

    def target(self, method: str, name: str) -> Formula:
        """The limit of a pass."""
        target = TARGETS[method, name]
        return limit(target, method, name, rank=self.rank, table=self.table, bias=self.bias)

    def has_limit(self, method: str) -> bool:
        """PEFT's dropout on DoRA keeps z besides y and reads a packed mask; the limits are not for it."""
        return method == "lora" or self.dropout == 0.0

    def peers(self, method: str, name: str) -> Iterator[Formula]:
        """What others move in a pass."""
        yield from PEERS[method, name]

    def published(self, method: str, name: str) -> Iterator[tuple[str, float, int]]:
        """Others' name, MiB with the rank's terms, and launches, where no formula is written down."""
        if (self.shape.M, self.shape.N, self.shape.K, self.rank) == PUBLISHED_AT:
            yield from PUBLISHED.get((method, name), ())

    def passes(self) -> Iterator[Pass]:
        """What one training step calls; tensors are allocated and never touched."""
        from fastpeft_kernels import dora, lora

        m, n, k = self.shape.M, self.shape.N, self.shape.K
        dropout_p, r = self.dropout, self.rank

        def wide(*dims: int) -> torch.Tensor:
            return torch.empty(dims, dtype=torch.bfloat16)

        def narrow(*dims: int) -> torch.Tensor:
            return torch.empty(dims, dtype=torch.float32)

        x, y, dy, weight, S = wide(m, k), wide(m, n), wide(m, n), wide(n, k), wide(m, r)
        lora_A, lora_B, magnitude, norm = narrow(r, k), narrow(n, r), narrow(n), narrow(n)
        seed = torch.zeros(1, dtype=torch.int64) if dropout_p > 0.0 else None
        bias = wide(n) if self.bias else None
        yield (
            "lora",
            "forward",
            lambda: lora.lora_forward(x, weight, bias, lora_A, lora_B, 2.0, dropout_p, seed),
        )
        yield (
            "lora",
            "backward",
            lambda: lora.lora_backward(
                dy,
                x,
                weight,
                lora_A,
                lora_B,
                S,
                2.0,
                dropout_p,
                seed,
                need_x=True,
                need_A=True,
                need_B=True,
                need_bias=self.bias,
            ),
        )
        drop_base = dropout_p > 0.0  # PEFT's default; without dropout it makes no difference
        keep_z = drop_base or self.bias

        def forward() -> None:
            dora.dora_forward(
                x,
                weight,
                bias,
                lora_A,
                lora_B,
                magnitude,
                norm,
                2.0,
                dropout_p,
                seed,
                drop_base=drop_base,
                keep_z=keep_z,
            )

        def with_norm() -> None:
            dora.row_norm(weight, lora_A, lora_B, 2.0)
            forward()

        def backward() -> None:
            dora.dora_backward(
                dy,
                x,
                y,
                weight,
                lora_A,
                lora_B,
                magnitude,
                norm,
                S,
                2.0,
                dropout_p,
                seed,
                drop_base=drop_base,
                kept_is_z=keep_z,
                need_x=True,
                need_A=True,
                need_B=True,
                need_m=True,
                need_bias=self.bias,
            )

        yield "dora", "forward", with_norm
        yield "dora", "forward, norm cached", forward
        yield "dora", "backward", backward
