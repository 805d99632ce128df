"""DoRA's linear layer: the factored norm, the GEMMs with a row scale, the passes over dY."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..family import Case, Family, Kernel, meta
from .lora import NAMES, Layer


@dataclass(frozen=True, kw_only=True, slots=True)
class DoraLayer(Layer):
    """One linear layer to run forward and backward; keep_z is what a bias or drop_base asks for."""

    drop_base: bool = True
    keep_z: bool = True


def layers() -> Iterator[DoraLayer]:
    """Every rank tile and every row of a GEMM without dropout and with each kind of it; then other dtypes."""
    base = DoraLayer()
    dropped, adapter_only = replace(base, dropout_p=0.1), replace(base, dropout_p=0.1, drop_base=False)
    yield replace(base, default=True)
    yield replace(dropped, r=64, default=True)
    yield replace(adapter_only, bias=False, keep_z=False, default=True)
    yield from (replace(base, r=r) for r in (8, 32, 64, 128))
    yield from (replace(dropped, r=r) for r in (8, 16, 32))
    for plain in (base, dropped, adapter_only):
        yield from (replace(plain, m=m, r=128) for m in (1024, 512, 64))
        yield replace(plain, dtype=torch.float32, r=32)
        yield replace(plain, m=8191, n=1001, k=999, r=64)
    from_y = replace(base, bias=False, keep_z=False)
    yield from (replace(from_y, m=m, r=128) for m in (8192, 1024, 512, 64))
    yield replace(from_y, dtype=torch.float32, r=32)
    yield replace(from_y, m=8191, n=1001, k=999, r=16)
    yield from (replace(base, n=n, r=r) for n in (1024, 16384) for r in (64, 128))
    yield replace(from_y, transposed=True)
    yield replace(base, dtype=torch.float16, adapter=torch.float16)


def cases(target: str) -> Iterator[Case]:
    """Norm, forward and backward of each layer, the same on every target."""
    for layer in layers():
        yield from layer_cases(layer)


def layer_cases(layer: DoraLayer) -> Iterator[Case]:
    """Norm, forward and backward of one layer."""
    from fastpeft_kernels import checked_norm, dora

    m, n, k, r, dtype = layer.m, layer.n, layer.k, layer.r, layer.dtype
    x, dy, S = (meta(m, width, dtype=dtype) for width in (k, n, r))
    weight = meta(k, n, dtype=dtype).t() if layer.transposed else meta(n, k, dtype=dtype)
    bias = meta(n, dtype=dtype) if layer.bias else None
    lora_A, lora_B = meta(r, k, dtype=layer.adapter), meta(n, r, dtype=layer.adapter)
    scale = meta(n, dtype=layer.adapter), meta(n, dtype=torch.float32)
    seed = meta(1, dtype=torch.int64) if layer.dropout_p > 0.0 else None

    def norm() -> None:
        dora.row_norm(weight, lora_A, lora_B, 2.0)

    def kept() -> None:
        prints = checked_norm.kept_norm(weight, lora_A, lora_B, 2.0)
        checked_norm.kept_norm(weight, lora_A, lora_B, 2.0, prints)

    def forward() -> None:
        dora.dora_forward(
            x,
            weight,
            bias,
            lora_A,
            lora_B,
            *scale,
            2.0,
            layer.dropout_p,
            seed,
            drop_base=layer.drop_base,
            keep_z=layer.keep_z,
        )

    def backward() -> None:
        dora.dora_backward(
            dy,
            x,
            dy,
            weight,
            lora_A,
            lora_B,
            *scale,
            S,
            2.0,
            layer.dropout_p,
            seed,
            drop_base=layer.drop_base,
            kept_is_z=layer.keep_z,
            need_x=True,
            need_A=True,
            need_B=True,
            need_m=True,
            need_bias=layer.bias,
        )

    aligned = n % 16 == 0 and k % 16 == 0
    dropout = (" drop base" if layer.drop_base else " drop") if layer.dropout_p > 0.0 else ""
    stages = [("norm", norm), ("kept", kept), ("fwd", forward), ("bwd", backward)]
    # Of a transposed W, lora.py has the GEMMs.
    for stage, run in stages[:2] if layer.transposed else stages:
        note = f"{stage} {NAMES[dtype]} r{r}{dropout}"
        yield Case(run=run, note=note, dtype=dtype, aligned=aligned, default=layer.default)


FAMILY = Family(
    name="dora",
    kernels=(
        Kernel(module="factored_norm", function="row_norm_kernel"),
        Kernel(module="checked_norm", function="kept_norm_kernel"),
        Kernel(module="two_product_gemm", function="two_product_gemm_kernel", gemm=True),
    ),
    keys=(
        "rank_r_gemm_dora",
        "rank_r_gemm_dora_backward",
        "rank_r_gemm_dora_z",
        "rank_r_gemm_dora_dropout",
        "rank_r_gemm_dora_dropout_backward",
        "row_norm",
        "grad_s_b_dora",
    ),
    cases=cases,
)
