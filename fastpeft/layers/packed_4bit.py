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
    weight = layer.weight
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        packed_absmax = state.absmax
        unpack = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse
        weight.data, weight.quant_state = unpack(weight.data, state)
        if not state.nested:  # which bitsandbytes leaves transposed, in bf16
            weight.quant_state.absmax = packed_absmax.T.reshape(-1).float()
