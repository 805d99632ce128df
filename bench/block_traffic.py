"""Fused blocks for `bench traffic`: q/k/v and the gated MLP, what their training step calls, their limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bench import block_peers, report
from bench.peers import Formula, limit
from fastpeft_kernels import Projection

if TYPE_CHECKING:
    from bench.launch_traffic import Operand, Pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A block on M tokens of K features, every projection with an adapter of one rank.

    Attributes:
        name: of the block, for its tables and records.
        tokens: M.
        features: K.
        widths: outputs of each projection that reads x; a gated MLP's are (d_ff, d_ff).
        rank: of every adapter.
        dropout: in front of every A, with DoRA's row scale on the undropped base product.
        gated: whether it is a gated MLP, whose third projection leads back to K features.
        table: has the tiles.
    """

    name: str
    tokens: int
    features: int
    widths: tuple[int, ...]
    rank: int
    dropout: float
    gated: bool = False
    table: str = "sm_90"

    def title(self) -> str:
        """As it stands above its tables."""
        widths = "/".join(map(str, self.widths[:1] if self.gated else self.widths))
        sizes = f"{self.tokens}x{self.features}x{widths}"
        return f"{self.name} {sizes}, bf16, r={self.rank}, dropout {self.dropout:g}"

    def about(self) -> report.Record:
        """What a record says of it."""
        return {
            "block": self.name,
            "tokens": self.tokens,
            "features": self.features,
            "widths": list(self.widths),
            "rank": self.rank,
            "dropout": self.dropout,
        }

    def is_wide(self, operand: Operand) -> bool:
        """Whether a tensor is as large as x, a weight, an output or a gate, in 16 bits."""
        m, k = self.tokens, self.features
        sizes = [(m, k), *((m, n) for n in self.widths), *((n, k) for n in self.widths)]
        sizes += [(k, n) for n in self.widths if self.gated]
        # A packed mask may have the dimensions of k and v, in bytes.
        return operand.shape in sizes and operand.size == 2 * math.prod(operand.shape)

    def moved(self, formula: Formula) -> float:
        """A formula's bytes for this block."""
        m, k, n = self.tokens, self.features, sum(self.widths)
        if not self.gated:
            return formula.total(x=2 * m * k, w=2 * n * k, y=2 * m * n)
        d_ff = self.widths[0]
        return formula.total(x=2 * m * k, w=2 * (n + d_ff) * k, f=2 * m * d_ff, y=2 * m * k)

    def target(self, method: str, name: str) -> Formula:
        """The limit of a pass."""
        target = (
            block_peers.gated_target(method, name)
            if self.gated
            else block_peers.stacked_target(method, name, len(self.widths))
        )
        # What one linear takes beyond its target, every linear of the block does: q/k/v's dY are Y in all, a
        # gated MLP's are dY and two of F.
        alone = replace(target, name=target.name, y=0, launches=0)
        more = limit(alone, method, name, rank=self.rank, table=self.table)
        count = len(self.widths) + self.gated
        return replace(
            target,
            name=more.name,
            y=target.y + more.y,
            f=target.f + (2 * more.y if self.gated else 0),
            launches=(target.launches or 0) + count * (more.launches or 0),
        )

    def has_limit(self, method: str) -> bool:
        """Always: dropout is in front of A only."""
        return True

    def peers(self, method: str, name: str) -> Iterator[Formula]:
        """What a pass moves at least, and what its linears move one by one."""
        if self.gated:
            yield from block_peers.gated_peers(method, name)
        else:
            yield from block_peers.stacked_peers(method, name, len(self.widths))

    def published(self, method: str, name: str) -> Iterator[tuple[str, float, int]]:
        """None."""
        return iter(())

    def passes(self) -> Iterator[Pass]:
        """What one training step calls; tensors are allocated and never touched."""
        of_method = self._gated_passes if self.gated else self._stacked_passes
        for method in ("lora", "dora"):
            yield from of_method(method)

    def _wide(self, *dims: int) -> torch.Tensor:
        return torch.empty(dims, dtype=torch.bfloat16)

    def _projection(self, n: int, k: int, method: str) -> Projection:
        def narrow(*dims: int) -> torch.Tensor:
            return torch.empty(dims, dtype=torch.float32)

        lora = Projection(
            weight=self._wide(n, k), lora_A=narrow(self.rank, k), lora_B=narrow(n, self.rank), scaling=2.0
        )
        return lora if method == "lora" else replace(lora, magnitude=narrow(n), norm=narrow(n))

    def _seeds(self, count: int) -> torch.Tensor | None:
        return torch.zeros(count, dtype=torch.int64) if self.dropout > 0.0 else None

    def _stacked_passes(self, method: str) -> Iterator[Pass]:
        from fastpeft_kernels import stacked

        m, count = self.tokens, len(self.widths)
        x = self._wide(m, self.features)
        projections = [self._projection(n, self.features, method) for n in self.widths]
        seeds, all_wanted, is_dora = self._seeds(count), [True] * count, method == "dora"
        dys, ys = ([self._wide(m, n) for n in self.widths] for _ in range(2))

        def forward() -> None:
            stacked.stacked_forward(x, projections, self.dropout, seeds)

        def backward() -> None:
            stacked.stacked_backward(
                dys,
                x,
                projections,
                self._wide(m, count * self.rank),
                ys if is_dora else [None] * count,
                [False] * count,
                self.dropout,
                seeds,
                need_x=True,
                need_A=all_wanted,
                need_B=all_wanted,
                need_m=[is_dora] * count,
                need_bias=[False] * count,
            )

        yield from _forwards(method, projections, forward)
        yield method, "backward", backward

    def _gated_passes(self, method: str) -> Iterator[Pass]:
        from fastpeft_kernels import dora, glu, lora, stacked

        m, k, d_ff, r = self.tokens, self.features, self.widths[0], self.rank
        x, y, dy, g, u = (self._wide(m, width) for width in (k, k, k, d_ff, d_ff))
        gate, up = (self._projection(d_ff, k, method) for _ in range(2))
        down = self._projection(k, d_ff, method)
        seeds, down_seed, is_dora = self._seeds(2), self._seeds(1), method == "dora"
        assert down.lora_A is not None
        assert down.lora_B is not None
        adapter = (down.lora_A, down.lora_B)

        def forward() -> None:
            h = glu.glu_forward(x, gate, up, "silu", self.dropout, seeds).h
            if down.magnitude is None or down.norm is None:
                lora.lora_forward(h, down.weight, None, *adapter, 2.0, self.dropout, down_seed)
                return
            scale = (down.magnitude, down.norm)
            dora.dora_forward(
                h,
                down.weight,
                None,
                *adapter,
                *scale,
                2.0,
                self.dropout,
                down_seed,
                drop_base=False,
                keep_z=False,
            )

        def backward() -> None:
            of_down = glu.glu_backward(
                dy,
                down,
                self._wide(m, r),
                y if is_dora else None,
                g,
                u,
                "silu",
                self.dropout,
                down_seed,
                need_h=True,
                need_A=True,
                need_B=True,
                need_m=is_dora,
                need_bias=False,
            )
            stacked.stacked_backward(
                [of_down.dg, of_down.du],
                x,
                [gate, up],
                self._wide(m, 2 * r),
                [g, u] if is_dora else [None, None],
                [False, False],
                self.dropout,
                seeds,
                need_x=True,
                need_A=[True, True],
                need_B=[True, True],
                need_m=[is_dora, is_dora],
                need_bias=[False, False],
            )

        yield from _forwards(method, [gate, up, down], forward)
        yield method, "backward", backward


def _forwards(method: str, projections: list[Projection], forward: Callable[[], None]) -> Iterator[Pass]:
    """The forward; in DoRA with the norms made, and with the norms kept."""
    from fastpeft_kernels import dora

    def with_norms() -> None:
        for p in projections:
            assert p.lora_A is not None
            assert p.lora_B is not None
            dora.row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
        forward()

    if method == "lora":
        yield method, "forward", forward
        return
    yield method, "forward", with_norms
    yield method, "forward, norm cached", forward


def blocks(
    *,
    tokens: int,
    features: int,
    out: int,
    kv: int,
    d_ff: int,
    rank: int,
    dropout: float,
    table: str = "sm_90",
) -> tuple[Block, ...]:
    """q/k/v of one width, q/k/v of grouped queries, and the gated MLP."""
    qkv = Block(
        name="q/k/v",
        tokens=tokens,
        features=features,
        widths=(out, out, out),
        rank=rank,
        dropout=dropout,
        table=table,
    )
    return (
        qkv,
        replace(qkv, name="grouped q/k/v", widths=(out, kv, kv)),
        replace(qkv, name="gated MLP", widths=(d_ff, d_ff), gated=True),
    )
