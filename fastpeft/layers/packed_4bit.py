"""bitsandbytes' 4-bit weights on CPUs with bf16 arithmetic, which pack themselves for their first inference.

A packed weight cannot be trained on (measured with bitsandbytes 0.50): its product gives x no gradient,
without a word, so that a training step after an evaluation is wrong; ``dequantize_4bit`` reads other numbers
from it; out_features that are no multiple of 32 fail. A patched model's weights are therefore kept as they
were made, also after ``unpatch``: whoever wants them packed for inference sets the attribute again.
"""

from __future__ import annotations

import sys
from typing import Any

PACKS = "support_avx512bf16_for_cpu"  # the attribute by which Linear4bit decides


def keep_unpacked(layer: Any) -> None:
    """Keep a 4-bit linear from packing its weight, and unpack one that has; nothing for any other module."""
    attributes = layer.__dict__
    if not attributes.get(PACKS):
        return
    attributes[PACKS] = False
    # The module's where the weight lost its class, as FSDP makes of it.
    state = getattr(layer.weight, "quant_state", None) or attributes.get("quant_state")
    if getattr(state, "packing_format_for_cpu", False):
        packed_absmax = state.absmax
        unpack = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
        layer.weight.data, state = unpack(layer.weight.data, state)  # the same state, changed
        if not state.nested:  # which bitsandbytes leaves transposed, in bf16
            state.absmax = packed_absmax.T.reshape(-1).float()
