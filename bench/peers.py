"""What an implementation moves for one linear layer, as formulas in X, W and Y; `block_peers` has blocks.

X = 2MK, W = 2NK and Y = 2MN are bytes in 16 bits; terms of the rank are left out (1 to 6 MiB at r = 16).
None of it is measured here: it is read from each project's sequence of operations. PEFT's DoRA backward, for
one: products with s and c (4Y), c's gradient from two products and their sums (8Y), the base product's share
of dY (2Y) and its sum with dY (3Y), dx (Y+W+X), dS and dB (2Y), dA and the adapter's dx (2X), their sum (3X).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Formula:
    """`x X + w W + f F + y Y` bytes in `launches` launches (None where nobody counted them).

    F = 2 M d_ff is a gated MLP's inner tensor; a single layer has none.
    """

    name: str
    x: float
    w: float
    y: float
    f: float = 0.0
    launches: int | None = None

    def bytes(self, m: int, n: int, k: int) -> float:
        """The formula's value for M tokens, N outputs, K inputs."""
        return self.total(x=2 * m * k, w=2 * n * k, y=2 * m * n)

    def total(self, *, x: int, w: int, y: int, f: int = 0) -> float:
        """The formula's value for tensors of so many bytes."""
        return self.x * x + self.w * w + self.f * f + self.y * y

    def text(self) -> str:
        """As `2X+W+Y`."""
        terms = [(self.x, "X"), (self.w, "W"), (self.f, "F"), (self.y, "Y")]
        return "+".join(f"{'' if count == 1 else f'{count:g}'}{name}" for count, name in terms if count)


TARGETS = {
    ("lora", "forward"): Formula(name="target", x=2, w=1, y=1, launches=2),
    ("lora", "backward"): Formula(name="target", x=2, w=1, y=2, launches=3),
    ("dora", "forward"): Formula(name="target", x=2, w=2, y=1, launches=3),
    ("dora", "forward, norm cached"): Formula(name="target", x=2, w=1, y=1, launches=2),
    ("dora", "backward"): Formula(name="target", x=2, w=1, y=3, launches=3),
}


def limit(target: Formula, method: str, name: str, *, rank: int, table: str, bias: bool = False) -> Formula:
    """The target, widened where it cannot be met; for a block, `target` is one linear's share.

    Above the last rank whose dS and dB share a read of dY (`grad_s_b`), backward is a launch and a Y more.
    Above the last whose Gram matrix is summed in the norm's own kernel, a norm is two launches. With a bias
    (or in fp16) DoRA's forward writes z besides y: a Y more.
    """
    from fastpeft_kernels import configs
    from fastpeft_kernels.tables import TABLES

    rows, reasons = TABLES[table], []
    more_y, more_launches = 0, 0
    shared = rows[configs.GRAD_S_B if method == "lora" else configs.GRAD_S_B_DORA][-1].block_r
    if name == "backward" and rank > shared:
        more_y, more_launches = 1, 1
        reasons.append(f"r above {shared}")
    gram = min(64, rows[configs.ROW_NORM][-1].block_r)
    if (method, name) == ("dora", "forward") and rank > gram:
        more_launches = 1
        reasons.append(f"r above {gram}")
    if bias and method == "dora" and name != "backward":
        more_y += 1
        reasons.append("z kept")
    launches = None if target.launches is None else target.launches + more_launches
    return replace(target, name=", ".join([target.name, *reasons]), y=target.y + more_y, launches=launches)


PEERS = {
    ("lora", "forward"): (
        Formula(name="one pass (minimum)", x=1, w=1, y=1, launches=1),
        Formula(name="Unsloth", x=2, w=1, y=3, launches=3),
        Formula(name="Axolotl", x=2, w=1, y=3, launches=3),
        Formula(name="PEFT in bf16", x=2, w=1, y=7, launches=5),
    ),
    ("lora", "backward"): (
        Formula(name="Axolotl", x=5, w=1, y=3, launches=6),
        Formula(name="Unsloth", x=5, w=1, y=4, launches=7),
        Formula(name="PEFT in bf16", x=6, w=1, y=5, launches=7),
    ),
    ("dora", "forward"): (
        Formula(name="Scaling DoRA", x=2, w=12, y=9, launches=9),
        Formula(name="PEFT", x=2, w=10, y=14, launches=14),
    ),
    ("dora", "forward, norm cached"): (Formula(name="Axolotl", x=4, w=1, y=10, launches=7),),
    ("dora", "backward"): (Formula(name="PEFT", x=6, w=1, y=20, launches=14),),
}

# Totals in MiB and launches where no formula is written down, at these M, N, K and r in bf16.
PUBLISHED_AT = (8192, 4096, 4096, 16)
PUBLISHED = {("dora", "backward"): (("Axolotl", 930, 9), ("Scaling DoRA", 1250, 10))}
