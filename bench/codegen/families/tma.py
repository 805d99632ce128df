"""The GEMM with rank-r epilogue on Hopper's and Blackwell's copy engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..family import Case, Family, Kernel, meta
from .lora import NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One `out = c * (P Q + scale * L R) + bias`; by_columns as in forward, where Q is W^T."""

    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    m: int = 8192
    n: int = 4096
    k: int = 4096
    r: int = 16
    by_columns: bool = True
    bias: bool = True
    row_scale: bool = False
    keep_z: bool = False
    default: bool = False


def products() -> Iterator[Product]:
    """Forward and dx at every rank tile of both rows and at four unrolled ones, LoRA and DoRA; then one
    change at a time."""
    forward, backward = Product(), Product(by_columns=False, bias=False)
    yield replace(forward, default=True)
    yield replace(backward, default=True)
    yield replace(backward, r=64, default=True)
    yield replace(forward, r=64, row_scale=True, keep_z=True, default=True)
    for m, r in ((8192, 16), (8192, 32), (8192, 64), (1024, 64), (8192, 128), (8192, 512)):
        yield from (replace(plain, m=m, r=r) for plain in (forward, backward))
        yield replace(forward, m=m, r=r, row_scale=True)
        yield replace(forward, m=m, r=r, row_scale=True, keep_z=True)
    yield replace(forward, adapter=torch.bfloat16)
    yield replace(backward, dtype=torch.float16)
    yield replace(forward, m=8191, n=1008, k=1008, r=5)


def cases(target: str) -> Iterator[Case]:
    """Each product, the same on both targets."""
    for product in products():
        yield product_case(product)


def product_case(product: Product) -> Case:
    """One launch."""
    from fastpeft_kernels import rank_r_gemm_tma
    from fastpeft_kernels.primitives import RowScale

    m, n, k, rank, dtype = product.m, product.n, product.k, product.r, product.dtype
    p, low = meta(m, k, dtype=dtype), meta(m, rank, dtype=dtype)
    q = meta(n, k, dtype=dtype).t() if product.by_columns else meta(k, n, dtype=dtype)
    r = meta(rank, n, dtype=product.adapter)
    if product.by_columns:
        r = meta(n, rank, dtype=product.adapter).t()
    bias = meta(n, dtype=dtype) if product.bias else None
    row_scale = None
    if product.row_scale:
        row_scale = RowScale(magnitude=meta(n, dtype=torch.float32), norm=meta(n, dtype=torch.float32))

    def run() -> None:
        config = rank_r_gemm_tma.select(p, q, rank, keep_z=product.keep_z)
        if config is not None:
            rank_r_gemm_tma.rank_r_gemm_tma(
                p, q, low, r, bias, 2.0, config, scale_columns=row_scale, keep_z=product.keep_z
            )

    words = ["fwd" if product.by_columns else "bwd", NAMES[dtype], f"r{rank}"]
    words += ["scale"] * product.row_scale + ["z"] * product.keep_z
    return Case(run=run, note=" ".join(words), dtype=dtype, default=product.default)


FAMILY = Family(
    name="tma",
    kernels=(Kernel(module="rank_r_gemm_tma", function="rank_r_gemm_tma_kernel", gemm=True),),
    keys=("rank_r_gemm_tma",),
    cases=cases,
    targets=("sm_90", "sm_100"),
)
