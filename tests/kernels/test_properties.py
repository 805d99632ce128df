"""Any shape, any strides, any rank: results that are exact, so that the test needs no tolerance.

Operands are -1, 0 and 1 and every factor a power of two, so every sum is exact in fp32 in whatever order it
is taken, and what is kept in between (S, dS, z) is exact in 16 bits too, which `assume` makes sure of. A
result is then the fp64 one, rounded once, and has to match bit for bit: a wrong mask, stride, tile or split
shows as a wrong integer. Formulas in floating point are for test_numerics.py and test_dora.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels import (
    Projection,
    dora_decode,
    dora_forward_single,
    lora_decode,
    lora_forward_single,
    row_norm,
)
from tests.device import DEVICE
from tests.kernels.block_reference import Block, evaluate_block, run_block
from tests.kernels.dora_reference import DoraProblem, evaluate_dora, run_dora
from tests.kernels.memory import surrounded_by_nan
from tests.kernels.reference import evaluate, run_lora
from tests.kernels.test_dropout import recover_mask, seed_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Derandomised: CI has to say the same of the same code twice. The example count is the interpreter's price.
exactly = settings(max_examples=30, deadline=None, derandomize=True, database=None)

Layout = Callable[[Tensor], Tensor]


def spread(tensor: Tensor, step: int) -> Tensor:
    """Equal values, `step` elements apart, NaN between them."""
    out = tensor.new_full((*tensor.shape[:-1], step * tensor.shape[-1] + 5), float("nan"))
    return out[..., 2 : 2 + step * tensor.shape[-1] : step].copy_(tensor)


LAYOUTS: list[Layout] = [
    lambda t: t,
    lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    lambda t: spread(t, 2),
    lambda t: spread(t, 3),
    lambda t: surrounded_by_nan(t) if t.dim() == 2 else spread(t, 1),
]
layouts = st.sampled_from(LAYOUTS)
widths = st.integers(1, 70)
ranks = st.one_of(st.integers(1, 9), st.integers(10, 80))
scalings = st.sampled_from([0.0, 0.5, 1, -1.0, 2.0])


@st.composite
def integers(draw: st.DrawFn, *shape: int, dtype: torch.dtype) -> Tensor:
    """-1, 0 and 1, in any layout."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randint(-1, 2, shape, generator=generator).to(DEVICE, dtype)
    return draw(layouts)(values)


@st.composite
def problems(
    draw: st.DrawFn, *, tokens: st.SearchStrategy[int], dora: bool, max_rank: int = 80
) -> DoraProblem:
    """One layer; without `dora` the magnitude and the norm are there all the same, and of no account."""
    m, k, n, r = draw(tokens), draw(widths), draw(widths), min(draw(ranks), max_rank)
    dtype = draw(st.sampled_from(DTYPES))
    adapter = draw(st.sampled_from([dtype, torch.float32]))
    generator = torch.Generator().manual_seed(n)
    c, norm = (
        torch.tensor(values, device=DEVICE)[torch.randint(len(values), (n,), generator=generator).to(DEVICE)]
        for values in ([1.0, 2.0, -1.0, -2.0], [0.5, 1.0, 4.0])
    )
    return DoraProblem(
        x=draw(integers(m, k, dtype=dtype)),
        weight=draw(integers(n, k, dtype=dtype)),
        bias=draw(st.none() | integers(n, dtype=adapter)),
        lora_A=draw(integers(r, k, dtype=adapter)),
        lora_B=draw(integers(n, r, dtype=adapter)),
        dy=draw(integers(m, n, dtype=dtype)),
        scaling=draw(scalings),
        magnitude=draw(layouts)((c * norm).to(adapter)) if dora else c,
        norm=norm,
    )


def with_dropout(p: DoraProblem, seed: Tensor) -> DoraProblem:
    """One half: 1 / (1 - p) is a power of two."""
    return replace(p, dropout_p=0.5, keep=recover_mask(*p.x.shape, 0.5, seed))


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).double(), tensor)


def assert_exact(found: dict[str, Tensor], reference: dict[str, Tensor], dtype: torch.dtype) -> None:
    """`found` is `reference` rounded once; examples that would round what is kept in between are dropped."""
    assume(all(fits(reference[name], dtype) for name in ("S", "z") if name in reference))
    for name, tensor in found.items():
        assert tensor.shape == reference[name].shape, name
        assert torch.equal(tensor, reference[name].to(tensor.dtype)), name


seeds = st.none() | st.integers(-(2**63), 2**63 - 1)


@exactly
@given(p=problems(tokens=st.integers(0, 70), dora=False), seed=seeds)
def test_lora(p: DoraProblem, seed: int | None) -> None:
    tensor = None if seed is None else seed_of(seed, DEVICE)
    if tensor is not None:
        p = with_dropout(p, tensor)
    reference = evaluate(p.to(torch.float64))
    assume(fits(p.dy.double() @ p.lora_B.double() * p.scaling, p.x.dtype))
    assert_exact(run_lora(p, tensor), reference, p.x.dtype)


@exactly
@given(p=problems(tokens=st.integers(0, 70), dora=True), seed=seeds, drop_base=st.booleans())
def test_dora(p: DoraProblem, seed: int | None, drop_base: bool) -> None:
    p.drop_base = drop_base
    tensor = None if seed is None else seed_of(seed, DEVICE)
    if tensor is not None:
        p = with_dropout(p, tensor)
    reference = evaluate_dora(p.to(torch.float64))
    c = reference["norm"].reciprocal() * p.magnitude.double()
    assume(fits((p.dy.double() * c) @ p.lora_B.double() * p.scaling, p.x.dtype))
    assert_exact(run_dora(p, seed=tensor), reference, p.x.dtype)


@exactly
@given(p=problems(tokens=st.just(1), dora=True))
def test_row_norm(p: DoraProblem) -> None:
    """The squares are exact; the square root is fp32's, to its last place."""
    found = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
    summed = p.weight.double() + p.scaling * (p.lora_B.double() @ p.lora_A.double())
    reference = summed.norm(dim=1)
    assert found.dtype == torch.float32
    assert ((found.double() - reference).abs() <= reference * torch.finfo(torch.float32).eps).all()


@exactly
@given(p=problems(tokens=st.integers(0, 70), dora=True, max_rank=64))
def test_single_kernel(p: DoraProblem) -> None:
    y, S = lora_forward_single(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    assert_exact({"y": y, "S": S}, evaluate(p.to(torch.float64)), p.x.dtype)
    operands = (p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.magnitude, p.norm, p.scaling)
    y, S, z, _ = dora_forward_single(*operands, keep_z=True)
    assert z is not None
    assert_exact({"y": y, "S": S, "z": z}, evaluate_dora(p.to(torch.float64)), p.x.dtype)


@exactly
@given(p=problems(tokens=st.integers(1, 16), dora=True, max_rank=64))
def test_decode(p: DoraProblem) -> None:
    y = lora_decode(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    assert_exact({"y": y}, evaluate(p.to(torch.float64)), p.x.dtype)
    y = dora_decode(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.magnitude, p.norm, p.scaling)
    assert_exact({"y": y}, evaluate_dora(p.to(torch.float64)), p.x.dtype)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """One to three projections of one x, each without an adapter, with LoRA or with DoRA."""
    m, k = draw(st.integers(0, 40)), draw(widths)
    dtype = draw(st.sampled_from(DTYPES))
    dropout = draw(st.booleans())
    projections: list[Projection] = []
    dys: list[Tensor | None] = []
    for kind in draw(st.lists(st.sampled_from(["none", "lora", "dora"]), min_size=1, max_size=3)):
        p = draw(problems(tokens=st.just(m), dora=kind == "dora", max_rank=24))
        n, r = p.weight.shape[0], p.lora_A.shape[0]
        adapter = p.lora_A.dtype
        projections.append(
            Projection(
                weight=draw(integers(n, k, dtype=dtype)),
                bias=p.bias,
                lora_A=None if kind == "none" else draw(integers(r, k, dtype=adapter)),
                lora_B=None if kind == "none" else p.lora_B,
                scaling=p.scaling,
                magnitude=p.magnitude if kind == "dora" else None,
                norm=p.norm if kind == "dora" else None,
            )
        )
        dys.append(draw(integers(m, n, dtype=dtype)))
    count = len(projections)
    tensor = torch.arange(count, device=DEVICE) * 1_000_003 + 7
    masks = [recover_mask(m, k, 0.5, tensor[i : i + 1]) if dropout else None for i in range(count)]
    return Block(
        x=draw(integers(m, k, dtype=dtype)),
        projections=projections,
        dys=dys,
        dropout_p=0.5 if dropout else 0.0,
        masks=masks,
        seeds=tensor if dropout else None,
    )


@exactly
@given(b=blocks())
def test_stacked(b: Block) -> None:
    reference = evaluate_block(b, torch.float64)
    for p, dy in zip(b.projections, b.dys, strict=True):
        if p.lora_B is not None and dy is not None:
            c = 1.0 if p.magnitude is None or p.norm is None else p.magnitude.double() / p.norm.double()
            assume(fits((dy.double() * c) @ p.lora_B.double() * p.scaling, b.x.dtype))
    kept = {f"z{i}" for i, p in enumerate(b.projections) if p.magnitude is not None}
    assume(all(fits(reference[name], b.x.dtype) for name in ("S", *kept)))
    for name, tensor in run_block(b).items():
        assert tensor.shape == reference[name].shape, name
        assert torch.equal(tensor, reference[name].to(tensor.dtype)), name
