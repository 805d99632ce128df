"""Gate activations and their derivatives in fp32: silu (SwiGLU) and gelu, exact or by tanh (GeGLU)."""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit  # type: ignore[untyped-decorator]
def activate(b_g: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """act(g). The tanh form is `g sigmoid(2 v)`, equal to `g (1 + tanh v) / 2`."""
    if ACTIVATION == "silu":
        b_h = b_g * tl.sigmoid(b_g)
    elif ACTIVATION == "gelu":
        b_h = 0.5 * b_g * (1.0 + tl.erf(b_g * INVERSE_SQRT_2))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        b_h = b_g * tl.sigmoid(b_g * (b_g * b_g * CUBIC + 1.0) * SQRT_8_OVER_PI)
    return b_h


@triton.jit  # type: ignore[untyped-decorator]
def activate_and_derive(b_g: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """`(act(g), act'(g))`."""
    if ACTIVATION == "silu":
        b_part = tl.sigmoid(b_g)
        b_slope = b_part * (1.0 + b_g * (1.0 - b_part))
    elif ACTIVATION == "gelu":
        b_part = 0.5 * (1.0 + tl.erf(b_g * INVERSE_SQRT_2))
        b_slope = b_part + b_g * INVERSE_SQRT_2_PI * tl.exp(-0.5 * b_g * b_g)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        b_square = b_g * b_g
        b_part = tl.sigmoid(b_g * (b_square * CUBIC + 1.0) * SQRT_8_OVER_PI)
        b_inner = b_g * (b_square * CUBIC * 3.0 + 1.0) * SQRT_8_OVER_PI
        b_slope = b_part * (1.0 + (1.0 - b_part) * b_inner)
    return b_g * b_part, b_slope
