"""The single-kernel forward or the split one, where nothing has been measured: the floor model's answer.

Modelled, not measured. A launch takes max(bytes / bandwidth, FLOPs / rate) and a fixed cost; the formulas are
in `single.py`. The constants are an H100's. Other devices have other ratios, but two terms decide: the launch
that is saved while W's read takes the time, and the tensor work that is added once it does not.
"""

from __future__ import annotations

BANDWIDTH = 3.0e12  # bytes a second
FLOP_RATE = 800e12
LAUNCH = 3e-6  # seconds from one kernel's last store to the next one's first load: fill, drain and gap
UNITS = 132
ITEMSIZE = 2

# The single kernel's tiles, as in tables/sm_90.py.
TILES = ((128, 128), (64, 128), (64, 64))

# Of the single-kernel forward and of decoding: above it the rank's accumulator and operands spill beside the
# base product's, and the split path serves.
MAX_RANK = 64
# Of decoding: the smallest row tile of a tensor core.
MAX_DECODE_TOKENS = 16


def prefers_single(
    m: int, n: int, k: int, r: int, *, needs_norm: bool = False, dropout: bool = False
) -> bool:
    """Whether the single-kernel forward is modelled to be faster than the split one.

    Args:
        m: tokens.
        n: out_features.
        k: in_features.
        r: rank; above 64 there is no single kernel.
        needs_norm: DoRA without a cached norm, which the split path spends a launch and a read of W on.
        dropout: the single kernel has none.
    """
    if r > MAX_RANK or dropout or min(m, n, k) == 0:
        return False
    x, w, y = (ITEMSIZE * size for size in (m * k, n * k, m * n))
    base = 2 * m * n * k / FLOP_RATE
    traffic = (x + w + y) / BANDWIDTH
    block_m, block_n = next((t for t in TILES if -(-m // t[0]) * -(-n // t[1]) >= UNITS), TILES[-1])
    extra = r / block_n + (r / block_m if needs_norm else 0.0)
    single = LAUNCH + max(traffic, base * (1.0 + extra))
    split = LAUNCH + x / BANDWIDTH + LAUNCH + max(traffic, base)
    if needs_norm:
        split += LAUNCH + w / BANDWIDTH
    return single < split
