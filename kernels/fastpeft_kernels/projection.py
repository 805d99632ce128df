"""One linear layer of a block, as the kernels of fused blocks take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """A frozen linear with LoRA, with DoRA or without an adapter.

    Attributes:
        weight: [N, K], any strides.
        bias: [N], or None.
        lora_A: [r, K], in the weight's dtype or fp32; None without an adapter.
        lora_B: [N, r], as lora_A.
        scaling: factor of the low-rank product, applied in fp32.
        magnitude: [N], DoRA's m; None for LoRA.
        norm: [N] fp32, `||W + s B A||` of each row, with magnitude.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    magnitude: Tensor | None = None
    norm: Tensor | None = None
