"""Gated MLPs of any shape, strides, ranks and kinds, with an activation that is exact: no tolerance.

Gates are 0 or multiples of 128, where silu and both gelu are 0, g or 0 to the last bit of fp32 and their
slopes 1/2, 1 or 0. With sparse operands of -1, 0 and 1 and factors that are powers of two, as in
test_properties.py, everything then is the fp64 result rounded once, and has to match bit for bit. What the
activations are in between is test_glu.py's concern.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels import Projection
from fastpeft_kernels.activation import ACTIVATIONS
from tests.device import DEVICE
from tests.kernels.block_reference import Block, Mlp, evaluate_mlp, run_mlp
from tests.kernels.test_dropout import recover_mask
from tests.kernels.test_properties import DTYPES, exactly, fits, integers, layouts, scalings

GATE = 128.0
kinds = st.sampled_from(["none", "lora", "dora"])
ranks = st.one_of(st.integers(1, 9), st.integers(10, 40))


@st.composite
def sparse(draw: st.DrawFn, *shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    """`-size`, 0 and `size` in any layout, four of them or so that are not 0 in a row and in a column."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    there = torch.rand(shape, generator=generator) < 4 / max(shape)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return draw(layouts)((signs * there * size).to(DEVICE, dtype))


@st.composite
def projections(
    draw: st.DrawFn, n: int, k: int, *, dtype: torch.dtype, adapter: torch.dtype, size: float = 1.0
) -> Projection:
    """[n, k], without an adapter, with LoRA or with DoRA; `size` is a factor of all that it gives."""
    p = Projection(
        weight=draw(sparse(n, k, dtype=dtype, size=size)),
        bias=draw(st.none() | sparse(n, dtype=dtype, size=size)),
    )
    kind, r = draw(kinds), draw(ranks)
    if kind == "none":
        return p
    p = replace(
        p,
        lora_A=draw(sparse(r, k, dtype=adapter)),
        lora_B=draw(sparse(n, r, dtype=adapter, size=size)),
        scaling=draw(scalings),
    )
    if kind == "lora":
        return p
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    c, norm = (
        torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)].to(DEVICE)
        for values in ([1.0, 2.0, -1.0, 0.5], [0.5, 1.0, 4.0])
    )
    return replace(p, magnitude=draw(layouts)((c * norm).to(adapter)), norm=norm)


@st.composite
def mlps(draw: st.DrawFn) -> Mlp:
    """Gate and up [d_ff, k], down [out, d_ff], each of a kind and rank of its own."""
    m, k, d_ff, out = (draw(st.integers(low, high)) for low, high in ((0, 40), (1, 40), (1, 70), (1, 40)))
    dtype = draw(st.sampled_from(DTYPES))
    dtypes = {"dtype": dtype, "adapter": draw(st.sampled_from([dtype, torch.float32]))}
    gate = draw(projections(d_ff, k, **dtypes, size=GATE))
    up, down = draw(projections(d_ff, k, **dtypes)), draw(projections(out, d_ff, **dtypes))
    p = 0.5 if draw(st.booleans()) else 0.0
    seeds = torch.arange(3, device=DEVICE) * 1_000_003 + 7
    masks = [
        recover_mask(m, width, p, seeds[i : i + 1]) if p else None for i, width in enumerate((k, k, d_ff))
    ]
    return Mlp(
        block=Block(
            x=draw(integers(m, k, dtype=dtype)),
            projections=[gate, up],
            dys=[],
            dropout_p=p,
            masks=masks[:2],
            seeds=seeds[:2] if p else None,
        ),
        down=down,
        dy=draw(integers(m, out, dtype=dtype)),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        mask=masks[2],
        seed=seeds[2:] if p else None,
    )


def row_scale(p: Projection) -> Tensor | float:
    return 1.0 if p.magnitude is None or p.norm is None else p.magnitude.double() / p.norm.double()


def kept_in_between(p: Mlp, reference: dict[str, Tensor]) -> list[Tensor]:
    """What the kernels round to the dtype and go on from, forward and backward."""
    outputs = [(p.block.projections[0], "g", "dg"), (p.block.projections[1], "u", "du"), (p.down, "y", None)]
    found = [reference[name] for name in ("S", "S_down", "g", "u", "h", "y", "dg", "du")]
    for q, y, dy in outputs:
        c, gradient = row_scale(q), p.dy.double() if dy is None else reference[dy]
        found += [c * gradient]
        if q.lora_B is not None:
            found += [(c * gradient) @ q.lora_B.double() * q.scaling]
        if q.bias is not None:
            found += [(reference[y] - q.bias.double()) / c]  # z
    return found


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of numpy, where silu ends at 0
@exactly
@given(p=mlps())
def test_gated_mlp(p: Mlp) -> None:
    reference = evaluate_mlp(p, torch.float64)
    # silu(-128) is -3e-54 in fp64.
    reference = {
        name: torch.where(value.abs() < 1e-30, 0.0, value) if value.numel() else value
        for name, value in reference.items()
    }
    assume(all(fits(tensor, p.dy.dtype) for tensor in kept_in_between(p, reference)))
    event(f"{p.dy.dtype}, dropout {p.block.dropout_p}")
    found = run_mlp(p)
    assert set(found) == set(reference)
    for name, tensor in found.items():
        assert tensor.shape == reference[name].shape, name
        assert torch.equal(tensor, reference[name].to(tensor.dtype)), name
