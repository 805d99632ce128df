"""One launch as Triton's JIT would specialise it: what a worker process needs to compile it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .family import Case, Kernel
from .targets import TARGETS

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "u1",
}

Row = tuple[str, str, int]
"""Table, key and index of a row of the configuration tables."""

COUNTS = ("R_TILES", "COUNT")
"""Compile-time numbers of what is unrolled: more of it holds less of it."""

RANK_AND_COUNT = ("R", "BLOCK_R", *COUNTS)

Path = tuple[int, ...]
"""Place of an argument, and within it of an entry of a tuple."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One specialised launch: everything `triton.compile` needs, and nothing that cannot be pickled."""

    target: str
    kernel: Kernel
    note: str
    dtype: str
    aligned: bool
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Path, Any], ...]
    attributes: tuple[tuple[Path, tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]
    zeros: tuple[Path, ...] = ()
    """Run-time integers that are 0: the strides of operands that are not there."""
    rows: frozenset[Row] = frozenset()
    """The rows of the configuration tables that its launcher took for it."""

    def identity(self) -> tuple[object, ...]:
        return self.target, self.kernel, self.signature, self.constants, self.attributes, self.options

    @property
    def is_16_bit(self) -> bool:
        return self.dtype in ("bf16", "fp16")

    def named_constants(self) -> dict[str, Any]:
        """Compile-time arguments by name; those inside a tuple are left out."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants if len(path) == 1}

    def stream_loads(self) -> int:
        """16-byte loads of one thread that read a tile of BLOCK_M x BLOCK_N of 16 bits."""
        constants, options = self.named_constants(), dict(self.options)
        threads = int(options["num_warps"]) * TARGETS[self.target].warp_size
        return -(-2 * int(constants["BLOCK_M"]) * int(constants["BLOCK_N"]) // (16 * threads))

    def rank_tile(self) -> int:
        """The tile of the rank; 0 in a kernel without one."""
        return int(self.named_constants().get("BLOCK_R", 0))

    def tile(self) -> tuple[object, ...]:
        """What a row decides: every tile, warps and stages, of this kernel on this target."""
        blocks = sorted(
            (name, value) for name, value in self.named_constants().items() if name.startswith("BLOCK_")
        )
        return *self.group(), *blocks

    def group(self) -> tuple[object, ...]:
        """What two launches must have in common for one to cover the other."""
        return self.target, self.kernel, self.options, self.aligned

    def covers(self, other: Launch) -> bool:
        """Whether its code holds at least what the code of `other`, of the same group, holds.

        It is the same but for a wider tile of the rank (not with `Kernel.each_rank_tile`), for more of them
        where they are unrolled, and for a rank that leaves part of a tile empty, so that it is masked; for
        operands and branches that `other` does without (a bias, dropout's mask, a row scale) and their
        strides; for projections that `other` does without; for bf16 in place of fp16 and fp32 adapters, which
        are converted, in place of 16-bit ones; for hints.
        """
        if self.rank_tile() < other.rank_tile() or other._masks_the_rank() > self._masks_the_rank():
            return False
        each = self.kernel.each_rank_tile and self.aligned and self.is_16_bit
        if each and self.rank_tile() != other.rank_tile():
            return False
        mine, others = self.named_constants(), other.named_constants()
        if any(mine.get(name, 0) < others.get(name, 0) for name in COUNTS):
            return False
        ours = self._arguments()
        converts = self.is_16_bit and other.is_16_bit

        def held(path: Path, value: Any) -> bool:
            if value in (None, False) or path in other.zeros:
                return True  # in place of None, ours may have a tuple
            own = ours.get(path)
            same = value == own and type(value) is type(own)
            return same or (converts and (value, own) == ("*bf16", "*fp32"))

        return all(held(path, value) for path, value in other._arguments().items())

    def _masks_the_rank(self) -> bool:
        """Whether the rank, where it is known at compile time, is no multiple of its tile."""
        r = self.named_constants().get("R")
        return isinstance(r, int) and r % max(self.rank_tile(), 1) != 0

    def _arguments(self) -> dict[Path, Any]:
        """Every argument's type (16-bit ones are one) or compile-time value, less the rank and the count."""
        free = [index for index, (name, _) in enumerate(self.signature) if name in RANK_AND_COUNT]
        values = dict(self.constants)
        found: dict[Path, Any] = {}

        def visit(path: Path, kind: Any) -> None:
            if isinstance(kind, tuple):
                for index, entry in enumerate(kind):
                    visit((*path, index), entry)
            elif path[0] not in free:
                found[path] = values[path] if kind == "constexpr" else kind.replace("fp16", "bf16")

        for index, (_, kind) in enumerate(self.signature):
            visit((index,), kind)
        return found

    def label(self) -> str:
        """Tile, warps, stages, the case's note and the branches taken."""
        constants = self.named_constants()
        blocks = {name: value for name, value in constants.items() if name.startswith("BLOCK_")}
        tile = "x".join(f"{name[6:].lower()}{value}" for name, value in blocks.items())
        options = dict(self.options)
        taken = [name for name, value in constants.items() if name.startswith("HAS_") and value]
        branches = [name[4:].lower() for name in taken]
        words = [tile, f"w{options['num_warps']}", f"s{options.get('num_stages', '-')}", self.note, *branches]
        return " ".join(words)


def specialise(
    target: str,
    case: Case,
    kernel: Kernel,
    params: Sequence[Any],
    bound: dict[str, Any],
    options: dict[str, Any],
    rows: frozenset[Row] = frozenset(),
) -> Launch:
    """The launch of `kernel` with `bound` arguments; `params` are those of its `triton.jit` function."""
    constants: list[tuple[Path, Any]] = []
    attributes: list[tuple[Path, tuple[tuple[str, int], ...]]] = []
    zeros: list[Path] = []

    def visit(path: Path, value: Any, constexpr: bool, free: bool) -> Any:
        if isinstance(value, tuple) and not constexpr:
            return tuple(visit((*path, index), entry, False, free) for index, entry in enumerate(value))
        if constexpr or value is None or (type(value) is int and value == 1 and not free):
            constants.append((path, value))
            return "constexpr"
        if type(value) is int and value == 0:
            zeros.append(path)
        kind, hints = argument(TARGETS[target].backend, value)
        if hints and not free:
            attributes.append((path, hints))
        return kind

    signature = [
        (param.name, visit((index,), bound[param.name], param.is_constexpr, param.do_not_specialize))
        for index, param in enumerate(params)
    ]
    return Launch(
        target=target,
        kernel=kernel,
        note=case.note,
        dtype=TYPES[case.dtype],
        aligned=case.aligned,
        signature=tuple(signature),
        constants=tuple(constants),
        attributes=tuple(attributes),
        options=tuple(options.items()),
        zeros=tuple(zeros),
        rows=rows,
    )


def argument(backend: str, value: Any) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Type of an argument in Triton's signature, and the hints its JIT attaches to it."""
    if isinstance(value, torch.Tensor):
        hints = [("tt.divisibility", 16)]  # torch's allocator aligns to far more
        if backend == "hip" and value.untyped_storage().nbytes() < 2**31:
            hints.append(("tt.pointer_range", 32))
        return "*" + TYPES[value.dtype], tuple(hints)
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>", ()
    if isinstance(value, bool):
        return "i1", ()
    if isinstance(value, float):
        return "fp32", ()
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, (("tt.divisibility", 16),) if value % 16 == 0 else ()
