"""LoRA's linear layer: down projection, GEMM with rank-r epilogue, the two gradient passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..family import Case, Family, Kernel, meta

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One linear layer to run forward and backward: PEFT's defaults unless said otherwise."""

    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.float32
    m: int = 8192
    n: int = 4096
    k: int = 4096
    r: int = 16
    dropout_p: float = 0.0
    bias: bool = True
    transposed: bool = False
    default: bool = False


def layers() -> Iterator[Layer]:
    """bf16 under fp32 adapters at every rank tile, every GEMM row at its widest rank tile; then one change
    at a time."""
    base, dropped = Layer(), Layer(dropout_p=0.1)
    yield replace(base, default=True)
    yield replace(dropped, r=64, default=True)
    for plain in (base, dropped):
        yield from (replace(plain, r=r) for r in (8, 16, 32, 64, 128))
        yield from (replace(plain, m=m, r=128) for m in (1024, 512, 64))
        yield replace(plain, dtype=torch.float32, r=32)
        yield replace(plain, m=8191, n=1001, k=999, r=64)
    yield replace(base, m=8191, n=1001, k=999, r=5)
    yield replace(dropped, dtype=torch.float16)
    yield replace(base, adapter=torch.bfloat16, bias=False)
    yield replace(base, transposed=True)


def cases(target: str) -> Iterator[Case]:
    """Forward and backward of each layer, the same on every target."""
    for layer in layers():
        yield from layer_cases(layer)


def layer_cases(layer: Layer) -> Iterator[Case]:
    """Forward and backward of one layer."""
    from fastpeft_kernels import lora

    m, n, k, r, dtype = layer.m, layer.n, layer.k, layer.r, layer.dtype
    x, dy, S = (meta(m, width, dtype=dtype) for width in (k, n, r))
    weight = meta(k, n, dtype=dtype).t() if layer.transposed else meta(n, k, dtype=dtype)
    bias = meta(n, dtype=dtype) if layer.bias else None
    lora_A, lora_B = meta(r, k, dtype=layer.adapter), meta(n, r, dtype=layer.adapter)
    seed = meta(1, dtype=torch.int64) if layer.dropout_p > 0.0 else None

    def forward() -> None:
        lora.lora_forward(x, weight, bias, lora_A, lora_B, 2.0, layer.dropout_p, seed)

    def backward() -> None:
        lora.lora_backward(
            dy,
            x,
            weight,
            lora_A,
            lora_B,
            S,
            2.0,
            layer.dropout_p,
            seed,
            need_x=True,
            need_A=True,
            need_B=True,
            need_bias=layer.bias,
        )

    aligned = n % 16 == 0 and k % 16 == 0
    for stage, run in (("fwd", forward), ("bwd", backward)):
        note = f"{stage} {NAMES[dtype]} r{r}"
        yield Case(run=run, note=note, dtype=dtype, aligned=aligned, default=layer.default)


FAMILY = Family(
    name="lora",
    kernels=(
        Kernel(module="down_projection", function="down_projection_kernel"),
        Kernel(module="rank_r_gemm", function="rank_r_gemm_kernel", gemm=True),
        Kernel(module="grad_s_b", function="grad_s_b_kernel"),
        Kernel(module="grad_a", function="grad_a_kernel"),
    ),
    keys=("rank_r_gemm", "rank_r_gemm_dropout", "down_projection", "grad_s_b", "grad_a"),
    cases=cases,
)
