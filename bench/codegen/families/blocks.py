"""Fused blocks: q/k/v in shared launches, gate and up with the activation, and the ways back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..family import Case, Family, Kernel, meta
from .lora import NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """q/k/v with grouped-query widths, or its first projections; gate, up and down of width n[0].

    Without `passes`, only the GEMMs, whose rows m decides; the passes over x and dY have theirs by rank.
    """

    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    m: int = 8192
    k: int = 4096
    n: tuple[int, ...] = (4096, 1024, 1024)
    r: tuple[int, ...] = (16, 16, 16)
    dora: bool = False
    dropout_p: float = 0.0
    bias: bool = False
    activation: str = "silu"
    transposed: bool = False
    passes: bool = True
    default: bool = False


def blocks() -> Iterator[Block]:
    """Least and most of an epilogue; most, with and without dropout, at every row; then one change each.

    The rows go with gelu, whose erf is the most code; silu and gelu_tanh are compiled once a kernel. Three
    projections stand for two.
    """
    least = Block()
    most = replace(least, r=(64, 64, 64), dora=True, dropout_p=0.1, bias=True, activation="gelu")
    yield replace(least, default=True)
    yield replace(most, default=True)
    for plain in (most, replace(most, dropout_p=0.0)):
        yield replace(plain, r=(128, 128, 128))
        yield from (replace(plain, m=m, r=(128, 128, 128), passes=False) for m in (1024, 512, 256, 64))
    yield replace(most, m=64, r=(128, 128, 128))
    yield from (replace(most, r=(r, r, r)) for r in (16, 32))
    yield replace(least, r=(64, 64, 64), activation="gelu_tanh")
    yield replace(least, r=(16, 0, 64), dropout_p=0.1, activation="gelu")
    yield replace(least, dtype=torch.float16, adapter=torch.float16, transposed=True)
    for changed in (replace(least, activation="gelu"), most):
        yield replace(changed, dtype=torch.float32, r=(32, 32, 32))
        yield replace(changed, m=8191, n=(1001, 333, 333), k=999, r=(64, 64, 64))


def cases(target: str) -> Iterator[Case]:
    """Every launcher on every block, the same on every target."""
    for block in blocks():
        yield from block_cases(block)


def block_cases(b: Block) -> Iterator[Case]:
    """The launchers of one block, called one by one: the rest of a backward belongs to other families."""
    from fastpeft_kernels import (
        glu_dh,
        glu_gemm,
        packed_mask,
        stacked_down,
        stacked_dx,
        stacked_gemm,
        stacked_grad,
    )
    from fastpeft_kernels.projection import Projection

    def projection(n: int, k: int, r: int) -> Projection:
        weight = meta(k, n, dtype=b.dtype).t() if b.transposed else meta(n, k, dtype=b.dtype)
        return Projection(
            weight=weight,
            bias=meta(n, dtype=b.dtype) if b.bias else None,
            lora_A=meta(r, k, dtype=b.adapter) if r else None,
            lora_B=meta(n, r, dtype=b.adapter) if r else None,
            scaling=2.0,
            magnitude=meta(n, dtype=b.adapter) if b.dora and r else None,
            norm=meta(n, dtype=torch.float32) if b.dora and r else None,
        )

    def wide(n: int) -> torch.Tensor:
        return meta(b.m, n, dtype=b.dtype)

    def packed(k: int) -> torch.Tensor | None:
        return meta(b.m, -(-k // 4), dtype=torch.uint8) if b.dropout_p else None

    def scale(p: Projection) -> torch.Tensor | None:
        return None if p.norm is None else p.norm

    adapted = [r for r in b.r if r]
    seeds = [meta(1, dtype=torch.int64) if b.dropout_p else None for _ in adapted]
    projections = [projection(n, b.k, r) for n, r in zip(b.n, b.r, strict=True)]
    dSs = [wide(r) for r in adapted]
    keep = b.dora and b.bias
    f, r = b.n[0], b.r[0]
    gate, down = projection(f, b.k, r), projection(b.k, f, r)
    dtypes = [b.adapter] * len(adapted)

    def run_down() -> None:
        adapters = [p.lora_A for p in projections if p.lora_A is not None]
        stacked_down.stacked_down(wide(b.k), adapters, b.dropout_p, seeds)

    def run_gemm() -> None:
        stacked_gemm.stacked_gemm(wide(b.k), projections, wide(sum(b.r)), [keep] * len(b.n))

    def run_grad() -> None:
        masks = [packed(b.k) for _ in adapted]
        stacked_grad.stacked_grad(wide(b.k), dSs, dtypes, b.dropout_p, seeds, packed=masks)

    def run_dx() -> None:
        dys, dS = [wide(n) for n in b.n], [wide(r) if r else None for r in b.r]
        masks = [packed(b.k) if r else None for r in b.r]
        stacked_dx.stacked_dx(dys, projections, dS, [scale(p) for p in projections], masks, 1.0)

    def run_glu() -> None:
        glu_gemm.glu_gemm(wide(b.k), gate, gate, wide(2 * r), b.activation, keep=True, keep_z=(keep, keep))

    def run_glu_dh() -> None:
        glu_dh.glu_backward_gemm(
            wide(b.k), down, wide(r), scale(down), wide(f), wide(f), b.activation, packed(f), 1.0
        )

    def run_glu_grad() -> None:
        stacked_grad.stacked_grad(
            wide(f),
            dSs[:1],
            dtypes[:1],
            b.dropout_p,
            seeds[:1],
            packed=[packed(f)],
            up=wide(f),
            activation=b.activation,
        )

    def run_mask() -> None:
        packed_mask.fill_mask(meta(b.m, b.k // 4, dtype=torch.uint8), b.k, 0.1, meta(1, dtype=torch.int64))

    words = ["dora" if b.dora else "lora", *(["drop"] if b.dropout_p else []), *(["bias"] if b.bias else [])]
    note = f"{NAMES[b.dtype]} r{'/'.join(map(str, b.r))} {' '.join(words)}"
    aligned = all(size % 16 == 0 for size in (*b.n, b.k))
    runs = [run_gemm, run_dx, run_glu, run_glu_dh]
    runs += [run_down, run_grad, run_glu_grad] if b.passes else []
    for run in (*runs, run_mask) if b.default else runs:
        yield Case(run=run, note=note, dtype=b.dtype, aligned=aligned, default=b.default)


FAMILY = Family(
    name="blocks",
    kernels=(
        Kernel(module="stacked_down", function="stacked_down_kernel"),
        Kernel(module="stacked_gemm", function="stacked_gemm_kernel", gemm=True),
        Kernel(module="stacked_grad", function="stacked_grad_kernel"),
        Kernel(module="stacked_dx", function="stacked_dx_kernel", gemm=True),
        Kernel(module="glu_gemm", function="glu_gemm_kernel", gemm=True),
        Kernel(module="glu_dh", function="glu_backward_kernel", gemm=True),
        Kernel(module="packed_mask", function="packed_mask_kernel", tensor_cores=False, streams=False),
    ),
    keys=(
        "stacked_down",
        "stacked_gemm",
        "stacked_dx",
        "stacked_dx_dropout",
        "stacked_grad",
        "glu_gemm",
        "glu_backward",
        "glu_backward_dropout",
    ),
    cases=cases,
)
