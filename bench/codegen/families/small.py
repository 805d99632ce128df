"""Few tokens and the path through cuBLAS: the single-kernel forward, decoding, expand-and-scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastpeft_kernels import decode, expand, single

from ..family import Case, Family, Kernel, meta
from .lora import NAMES


class Layer:
    """Operands of a linear [n, k]: PEFT's defaults unless said otherwise."""

    def __init__(
        self,
        m: int,
        r: int,
        *,
        n: int = 4096,
        k: int = 4096,
        dtype: torch.dtype = torch.bfloat16,
        adapter: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        weight = meta(k, n, dtype=dtype).t() if transposed else meta(n, k, dtype=dtype)
        self.linear = (meta(m, k, dtype=dtype), weight, meta(n, dtype=dtype))
        self.adapter = (meta(r, k, dtype=adapter), meta(n, r, dtype=adapter))
        self.magnitude = meta(n, dtype=adapter)
        self.norm = meta(n, dtype=torch.float32)
        self.seed = meta(1, dtype=torch.int64)
        self.shape = (m, n, k, r)
        self.dtype = dtype

    def case(self, run: Callable[[], object], note: str, *, default: bool = False) -> Case:
        m, n, k, r = self.shape
        aligned = n % 16 == 0 and k % 16 == 0
        note = f"{note} {NAMES[self.dtype]} m{m} r{r}"
        return Case(run=run, note=note, dtype=self.dtype, aligned=aligned, default=default)

    def single(self, *, default: bool = False) -> Iterator[Case]:
        """LoRA, and DoRA with the norm summed and given."""
        lora = partial(single.lora_forward_single, *self.linear, *self.adapter, 2.0)
        dora = partial(single.dora_forward_single, *self.linear, *self.adapter, self.magnitude)
        yield self.case(lora, "lora", default=default)
        yield self.case(partial(dora, None, 2.0, keep_z=True), "dora norm z", default=default)
        yield self.case(partial(dora, self.norm, 2.0, keep_z=True), "dora z")

    def decode(self, *, default: bool = False) -> Iterator[Case]:
        dora = partial(decode.dora_decode, *self.linear, *self.adapter, self.magnitude, self.norm, 2.0)
        yield self.case(dora, "dora", default=default)
        yield self.case(partial(decode.lora_decode, *self.linear, *self.adapter, 2.0), "lora")

    def expand(self, *, default: bool = False) -> Iterator[Case]:
        m, n, _, r = self.shape
        y, z, low = (meta(m, width, dtype=self.dtype) for width in (n, n, r))
        lora_B, bias = self.adapter[1], self.linear[2]
        run = partial(expand.expand_scale_, y, low, lora_B, 2.0, bias, self.magnitude, self.norm, z)
        yield self.case(run, "dora z", default=default)
        yield self.case(partial(expand.expand_scale_, y, low, lora_B, 2.0, bias), "lora")
        right = meta(r, n, dtype=lora_B.dtype)
        yield self.case(partial(expand.expand_add_, y, low, right, 1.1, 0.1, self.seed), "dx drop")
        yield self.case(partial(expand.expand_add, y, low, lora_B.t(), 2.0, bias), "bottleneck")


def cases(target: str) -> Iterator[Case]:
    """Every row at ranks 16 and 64, then one departure at a time; default: one tile of each key at r = 16."""
    for r in (16, 32, 64):
        for m in (8192, 320, 64):
            yield from Layer(m, r).single(default=(m, r) == (64, 16))
    for r in (16, 64):
        yield from Layer(16, r).decode(default=r == 16)
        yield from Layer(2048, r).expand(default=r == 16)
    # Enough columns that decoding does not split K.
    yield from Layer(1, 16, n=32768).decode()
    for layer in (
        Layer(64, 64, dtype=torch.float32),
        Layer(64, 32, dtype=torch.float32),
        Layer(63, 64, n=1001, k=999),
        Layer(63, 16, n=1001, k=999),
        Layer(64, 16, dtype=torch.float16, adapter=torch.float16),
        Layer(64, 16, transposed=True),
    ):
        yield from layer.single()
        yield from layer.expand()
    for layer in (
        Layer(3, 64, dtype=torch.float32),
        Layer(15, 64, n=1001, k=999),
        Layer(16, 16, dtype=torch.float16, adapter=torch.float16),
        Layer(16, 16, transposed=True),
    ):
        yield from layer.decode()


FAMILY = Family(
    name="small",
    kernels=(
        Kernel(module="single", function="single_kernel", gemm=True, each_rank_tile=True),
        Kernel(module="decode", function="decode_kernel"),
        # Its stream is y, read once before the loop over the rank.
        Kernel(module="expand", function="expand_kernel", streams=False, reads_tile=True),
    ),
    keys=("single", "single_norm", "decode", "expand"),
    cases=cases,
)
