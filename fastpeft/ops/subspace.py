"""Random projections ``P`` [D, d] that are never stored: every entry is made of a seed and a counter.

    theta = theta_0 + P theta_d            Li et al. 2018, arXiv 1804.08838

The D parameters are cut into blocks of n; block b has randomness of its own, an integer hash of (seed, b) and
of the place in the block. So any part of P can be made by itself, in any order and on any device, and equal
seeds give equal projections in every process. Two kinds:

**fastfood** (Le, Sarlos, Smola 2013), n the power of two above d, theta_d filled up with zeros to n::

    P_b = 1/sqrt(D) * 1/|g| * H diag(g) Pi H diag(s)

with H the Hadamard matrix of +1 and -1 [n, n], s signs, Pi a permutation, g normal numbers (4096 values, the
quantiles' midpoints, so that no device's logarithm matters). All columns of a whole block have one length, so
P's columns have length 1, but for the last, cut block of each tensor, where they have it on average. Inner
products of two columns have a standard deviation of sqrt(2/D), a dense normal P's sqrt(1/D).

**hashed**, n = d: parameter i of block b takes one coordinate, ``s_i theta_d[h(i)] / sqrt(count(h(i)))`` with
``h(i) = (a_b (i mod d) + c_b) mod d`` and a_b prime to d. No two parameters of a block share a coordinate, so
P^T P is the identity exactly, and neither direction adds in an order that could vary.

What lives when: a few tables for all (4096 normal numbers and H of 64, or the counts [d] and the factors a),
and while a projection runs, the randomness of one chunk of blocks (2^16 elements on a CPU). It costs about 25
element-wise passes over the parameters either way, and in fastfood two transforms of n log n additions for
each block, done as products with H of at most 64. fp32, fp64 over an fp64 model; on a GPU
``torch.backends.cuda.matmul.allow_tf32`` would round the transforms to 10 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RADIX = 64  # of the largest Hadamard matrix that is formed
_LEVELS = 4096  # values of the normal numbers, and factors prime to d
_GOLDEN = 0x9E3779B9
# Per chunk: fits a CPU's second-level cache; on other devices a kernel must have something to do.
_CHUNK_CPU, _CHUNK = 2**16, 2**22
_MASK32 = 2**32 - 1


def _signed(number: int) -> int:
    """A number modulo 2^32 as an int32's value."""
    number &= _MASK32
    return number - 2**32 if number >= 2**31 else number


_C1, _C2, _C3 = _signed(0x7FEB352D), _signed(0x846CA68B), _signed(0x9E3779B1)


def _mixed(number: int) -> int:
    """The hash of one number, by Python; a bijection of [0, 2^32)."""
    number &= _MASK32
    number = (number ^ (number >> 16)) * 0x7FEB352D & _MASK32
    number = (number ^ (number >> 15)) * 0x846CA68B & _MASK32
    return number ^ (number >> 16)


def _shifted_xor_(x: Tensor, bits: int) -> Tensor:
    """``x ^= x >>> bits`` of an int32, in place."""
    return x.bitwise_xor_((x >> bits).bitwise_and_(2 ** (32 - bits) - 1))


def _mix_(x: Tensor) -> Tensor:
    """:func:`_mixed` of every element of an int32, in place."""
    _shifted_xor_(x, 16).mul_(_C1)
    _shifted_xor_(x, 15).mul_(_C2)
    return _shifted_xor_(x, 16)


@dataclass(frozen=True)
class Projection:
    """Which projection, with everything about it that is a number.

    Attributes:
        is_fastfood: or hashed.
        d: coordinates.
        seed: in [0, 2^32).
        total: D, how many parameters there are.
    """

    is_fastfood: bool
    d: int
    seed: int
    total: int

    def spec(self) -> list[int]:
        """Return the projection as custom ops take it: (is_fastfood, d, seed, total)."""
        return [int(self.is_fastfood), self.d, self.seed, self.total]

    @classmethod
    def from_spec(cls, spec: Sequence[int]) -> Projection:
        """Return the projection of a :meth:`spec`."""
        return cls(bool(spec[0]), *spec[1:])

    @property
    def block(self) -> int:
        """Parameters in a block, n: as many coordinates as :func:`coordinates` returns."""
        return max(32, 1 << (self.d - 1).bit_length()) if self.is_fastfood else self.d

    def blocks(self, numel: int) -> int:
        """How many blocks a tensor takes; each begins one of its own."""
        return -(-numel // self.block)

    def chunk(self, like: Tensor) -> int:
        """How many blocks are projected at a time."""
        return max(1, (_CHUNK_CPU if like.is_cpu else _CHUNK) // self.block)


def tables(projection: Projection, numels: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Return what both directions read, on the CPU.

    Args:
        projection: which.
        numels: of all tensors, in order.
        dtype: of the coordinates.

    Returns:
        Fastfood: normal numbers [4096] and H [64, 64]. Hashed: factors prime to d [at most 4096, int64] and
        ``1 / sqrt(count)`` of each coordinate [d], 0 where no parameter takes it.
    """
    if projection.is_fastfood:
        middles = (torch.arange(_LEVELS, dtype=torch.float64, device="cpu") + 0.5) / _LEVELS
        normal = torch.special.ndtri(middles)
        normal /= normal.square().mean().sqrt()
        H = torch.ones(1, 1, dtype=dtype, device="cpu")
        while len(H) < _RADIX:
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        return [normal.to(dtype), H]
    d = projection.d
    units: list[int] = []
    for i in range(8 * _LEVELS):  # a unit is found within a few draws for any d
        candidate = 1 if d == 1 else 1 + _mixed(_mixed(projection.seed) + i) % (d - 1)
        if math.gcd(candidate, d) == 1:
            units.append(candidate)
            if len(units) == min(_LEVELS, 4 * d):
                break
    factors = torch.tensor(units, dtype=torch.int64, device="cpu")
    counts = torch.zeros(d, dtype=torch.float64, device="cpu")
    first = 0
    for numel in numels:
        counts += numel // d
        if rest := numel % d:  # the places of the last block that the tensor fills
            last = torch.tensor([first + numel // d], device="cpu")
            buckets, _ = _buckets(projection, last, factors)
            counts.index_add_(0, buckets[0, :rest], torch.ones(rest, dtype=torch.float64, device="cpu"))
        first += projection.blocks(numel)
    return [factors, torch.where(counts > 0, counts.rsqrt(), 0.0).to(dtype)]


def coordinates(projection: Projection, theta_d: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Return what the blocks multiply, [n], of ``theta_d`` [d]: everything of P that all blocks share."""
    if not projection.is_fastfood:
        return theta_d * tables[1]
    scaled = theta_d * (1.0 / math.sqrt(projection.total))
    return torch.nn.functional.pad(scaled, (0, projection.block - projection.d))


def project(projection: Projection, phi: Tensor, blocks: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Return rows of ``P theta_d``, one for each block: [blocks, n].

    Args:
        projection: which.
        phi: [n], of :func:`coordinates`.
        blocks: [blocks], int64, counted over all tensors.
        tables: of :func:`tables`.
    """
    return _Draw(projection, blocks, tables).project(phi)


class _Draw:
    """The randomness of some blocks, for both directions."""

    def __init__(self, projection: Projection, blocks: Tensor, tables: Sequence[Tensor]) -> None:
        self.projection, self.tables = projection, tables
        if not projection.is_fastfood:
            self.buckets, hashed = _buckets(projection, blocks, tables[0])
            self.signs = _signs(hashed, tables[1].dtype)
            return
        n = projection.block
        hashed, (key, other) = _hashed(projection, blocks)
        normal, self.H = tables
        self.signs = _signs(hashed, normal.dtype)
        levels = (hashed >> 19).bitwise_and_(_LEVELS - 1)  # beside the sign, the bits that are mixed best
        g = normal.index_select(0, levels.flatten()).view(hashed.shape)
        self.g = g.div_(torch.linalg.vector_norm(g, dim=1, keepdim=True))
        # A bijection of [0, n): odd factors, and an xor with the higher half of the bits.
        bits = n.bit_length() - 1
        place = torch.arange(n, dtype=torch.int32, device=blocks.device)
        permutation = (place * (key | 1)).add_(other).bitwise_and_(n - 1)
        permutation.bitwise_xor_(permutation >> (bits + 1) // 2)
        permutation.mul_((other >> 7) | 1).add_(key >> 9).bitwise_and_(n - 1)
        self.permutation = permutation.long()

    def project(self, phi: Tensor) -> Tensor:
        """phi [n] to [blocks, n]."""
        if not self.projection.is_fastfood:
            return phi.index_select(0, self.buckets.flatten()).view(self.buckets.shape) * self.signs
        u = _transformed(phi * self.signs, self.H)
        return _transformed(torch.gather(u, 1, self.permutation) * self.g, self.H)

    def transposed(self, v: Tensor) -> Tensor:
        """The sum over blocks of their ``P_b^T v_b``: v [blocks, n] to [n]."""
        if not self.projection.is_fastfood:
            return torch.zeros_like(v).scatter_(1, self.buckets, v * self.signs).sum(0)
        u = _transformed(v, self.H).mul_(self.g)
        return (
            _transformed(torch.empty_like(u).scatter_(1, self.permutation, u), self.H).mul_(self.signs).sum(0)
        )


def _keys(projection: Projection, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Two hashes of each block, [blocks, 1], int32."""
    base = _mixed(projection.seed)
    numbers = blocks[:, None].to(torch.int32)  # fewer than 2^31
    return _mix_(numbers + _signed(base)), _mix_(
        (numbers * _C3).bitwise_xor_(_signed(_mixed(base + _GOLDEN)))
    )


def _hashed(projection: Projection, blocks: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A hash of each (block, place), [blocks, n], whose high bits are good; and the blocks' keys."""
    key, other = _keys(projection, blocks)
    places = torch.arange(projection.block, dtype=torch.int32, device=blocks.device).mul_(_signed(_GOLDEN))
    # The second key comes in after the first round: two blocks then share no run of numbers.
    x = _shifted_xor_(places + key, 16).mul_(_C1).add_(other)
    return _shifted_xor_(x, 15).mul_(_C2), (key, other)


def _signs(hashed: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 or -1, of the highest bit."""
    return (hashed >> 31).bitwise_or_(1).to(dtype)


def _buckets(projection: Projection, blocks: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinate of each (block, place), [blocks, d], int64; and its hash."""
    hashed, (key, other) = _hashed(projection, blocks)
    d = projection.d
    a = factors[((key >> 5) & _MASK32 >> 5).long() % len(factors)]
    places = torch.arange(d, dtype=torch.int64, device=blocks.device)
    return (places * a).add_(other.long() % d).remainder_(d), hashed


def _transformed(u: Tensor, H: Tensor) -> Tensor:
    """``H_n`` times each row of u [rows, n], n a power of two: by factors of at most 64."""
    rows, n = u.shape
    bits, below = n.bit_length() - 1, 1
    factors = -(-bits // (_RADIX.bit_length() - 1))
    for i in range(factors):
        r = 1 << (bits // factors + (i < bits % factors))
        # Sylvester's matrices hold the smaller ones. Row p of the left factor meets places p * below + q.
        batch = u.view(rows * (n // (r * below)), r, below) if below > 1 else u.view(-1, r, 1)
        part = H[:r, :r]
        if below == 1:
            square = u.view(rows, n // r, r)
            u = torch.bmm(square, part.expand(rows, r, r)).view(rows, n)
        else:
            u = torch.bmm(part.expand(len(batch), r, r), batch).view(rows, n)
        below *= r
    return u


def chunks(projection: Projection, numel: int, like: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (first block of the tensor, first element, element after the last) of runs of blocks."""
    n, step = projection.block, projection.chunk(like)
    for block in range(0, projection.blocks(numel), step):
        yield block, block * n, min(numel, (block + step) * n)


def add_projected(
    projection: Projection,
    weight: Tensor,
    phi: Tensor,
    tables: Sequence[Tensor],
    first: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``W_0 + P theta_d`` of one tensor, in ``dtype``; the sum is rounded once.

    Args:
        projection: which.
        weight: W_0, of any shape.
        phi: [n], of :func:`coordinates`.
        tables: of :func:`tables`.
        first: the tensor's first block.
        dtype: of the result.
    """
    flat = weight.reshape(-1)
    result = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    for block, start, end in chunks(projection, flat.numel(), flat):
        draw = _Draw(projection, _run(projection, first + block, end - start, flat), tables)
        result[start:end] = draw.project(phi).view(-1)[: end - start].add_(flat[start:end])
    return result.view(weight.shape)


def projected_gradient(
    projection: Projection,
    gradient: Tensor,
    tables: Sequence[Tensor],
    first: int,
    *,
    refill: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return ``P^T dW`` of one tensor, the gradient of phi [n].

    Args:
        projection: which.
        gradient: dW, of the tensor's shape.
        tables: of :func:`tables`.
        first: the tensor's first block.
        refill: (W_0, phi): the gradient's memory, contiguous, takes ``W_0 + P theta_d`` as the gradient is
            used up, so that the randomness is drawn once and no second tensor of that size lives.
    """
    flat = gradient.reshape(-1) if refill is None else gradient.view(-1)
    dtype = tables[1].dtype
    total = torch.zeros(projection.block, dtype=dtype, device=flat.device)
    for block, start, end in chunks(projection, flat.numel(), flat):
        blocks = _run(projection, first + block, end - start, flat)
        draw = _Draw(projection, blocks, tables)
        v = flat[start:end].to(dtype)
        if (missing := len(blocks) * projection.block - v.numel()) > 0:
            v = torch.nn.functional.pad(v, (0, missing))
        total += draw.transposed(v.view(len(blocks), projection.block))
        if refill is not None:
            weight, phi = refill
            delta = draw.project(phi).view(-1)[: end - start]
            flat[start:end] = delta.add_(weight.reshape(-1)[start:end])
    return total


def _run(projection: Projection, first: int, elements: int, like: Tensor) -> Tensor:
    return torch.arange(first, first + projection.blocks(elements), device=like.device)
