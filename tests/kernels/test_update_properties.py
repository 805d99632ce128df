"""Updates of a given result, any shape, strides and rank, exact as in test_properties.py: no tolerance.

The path through the vendor's GEMM (expand-and-scale in place, for forward and for dx), LoRA's update on a
given base product, and a bottleneck's.
"""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels import (
    bottleneck_up,
    bottleneck_up_backward,
    dora_forward_expand,
    expand_add_,
    launch,
    lora_add_,
    lora_add_backward,
    lora_forward_expand,
)
from tests.device import DEVICE
from tests.kernels.dora_reference import DoraProblem, evaluate_dora
from tests.kernels.memory import untouched
from tests.kernels.reference import evaluate
from tests.kernels.test_dropout import seed_of
from tests.kernels.test_properties import (
    DTYPES,
    assert_exact,
    exactly,
    fits,
    integers,
    problems,
    scalings,
    seeds,
    with_dropout,
)

tokens = st.integers(0, 70)


def seeded(p: DoraProblem, seed: int | None) -> tuple[DoraProblem, Tensor | None]:
    """The problem with the mask of `seed` in front of A alone, where there is a seed."""
    p.drop_base = False
    tensor = None if seed is None else seed_of(seed, DEVICE)
    return (p if tensor is None else with_dropout(p, tensor)), tensor


def vendor_multiplies(p: DoraProblem) -> None:
    """Drop what the vendor cannot: oneDNN on AMX reads past the rows of a strided x with odd K, NaN there."""
    assume(torch.equal((p.x @ p.weight.T).double(), p.x.double() @ p.weight.double().T))


def contiguous(tensor: Tensor) -> Tensor:
    """A copy that a kernel may write over, in a buffer that starts where a launcher's would."""
    return launch.empty(tuple(tensor.shape), tensor.dtype, tensor).copy_(tensor)


@exactly
@given(p=problems(tokens=tokens, dora=False), seed=seeds)
def test_lora_over_the_vendors_product(p: DoraProblem, seed: int | None) -> None:
    vendor_multiplies(p)
    p, tensor = seeded(p, seed)
    reference = evaluate(p.to(torch.float64))
    dS = (p.dy.double() @ p.lora_B.double()) * p.scaling
    assume(fits(dS, p.x.dtype))
    base = contiguous((p.dy.double() @ p.weight.double()).to(p.x.dtype))
    with untouched(p, tensor):
        y, S = lora_forward_expand(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, p.dropout_p, tensor)
        keep_scale = 1.0 / (1.0 - p.dropout_p)
        dx = expand_add_(base, dS.to(p.x.dtype), p.lora_A, keep_scale, p.dropout_p, tensor)
    assert_exact({"y": y, "S": S, "dx": dx}, reference, p.x.dtype)


@exactly
@given(p=problems(tokens=tokens, dora=True), seed=seeds)
def test_dora_over_the_vendors_product(p: DoraProblem, seed: int | None) -> None:
    vendor_multiplies(p)
    p, tensor = seeded(p, seed)
    rest = (p.bias, p.lora_A, p.lora_B, p.magnitude, p.norm, p.scaling, p.dropout_p, tensor)
    with untouched(p, tensor):
        y, S, z = dora_forward_expand(p.x, p.weight, *rest, drop_base=False, keep_z=True)
    assert z is not None
    assert_exact({"y": y, "S": S, "z": z}, evaluate_dora(p.to(torch.float64)), p.x.dtype)


@exactly
@given(p=problems(tokens=tokens, dora=False), seed=seeds, data=st.data())
def test_lora_on_a_given_base(p: DoraProblem, seed: int | None, data: st.DataObject) -> None:
    p, tensor = seeded(p, seed)
    p.bias = None
    base = data.draw(integers(*p.dy.shape, dtype=p.x.dtype))
    reference = evaluate(p.to(torch.float64))
    reference["y"] += base.double() - p.x.double() @ p.weight.double().T
    reference["dx"] -= p.dy.double() @ p.weight.double()
    assume(fits((p.dy.double() @ p.lora_B.double()) * p.scaling, p.x.dtype))
    options = (p.scaling, p.dropout_p, tensor)
    wanted = {"need_x": True, "need_A": True, "need_B": True}
    with untouched(p, tensor, base):
        y, S = lora_add_(contiguous(base), p.x, p.lora_A, p.lora_B, *options)
        gradients = lora_add_backward(p.dy, p.x, p.lora_A, p.lora_B, S, *options, **wanted)
    found = {"y": y, "S": S} | dict(zip(("dx", "dA", "dB"), gradients, strict=True))
    assert_exact(found, reference, p.x.dtype)  # type: ignore[arg-type]


@exactly
@given(data=st.data(), scaling=scalings)
def test_bottleneck(data: st.DataObject, scaling: float) -> None:
    m, n, size = (data.draw(st.integers(low, 70)) for low in (0, 1, 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    own = data.draw(st.sampled_from([dtype, torch.float32]))
    base, dy = (data.draw(integers(m, n, dtype=dtype)) for _ in range(2))
    a = data.draw(integers(m, size, dtype=dtype))
    up, up_bias = data.draw(integers(n, size, dtype=own)), data.draw(integers(n, dtype=own))
    exact = [tensor.double() for tensor in (base, a, up, up_bias, dy)]
    b64, a64, up64, bias64, dy64 = exact
    reference = {
        "y": b64 + scaling * (a64 @ up64.T + bias64),
        "da": scaling * (dy64 @ up64),
        "dup": scaling * (dy64.T @ a64),
        "dup_bias": scaling * dy64.sum(0),
    }
    flags = {"need_a": True, "need_up": True, "need_up_bias": True}
    with untouched(base, dy, a, up, up_bias):
        y = bottleneck_up(base, a, up, up_bias, scaling)
        gradients = bottleneck_up_backward(dy, a, up, scaling, **flags)
    found = {"y": y} | dict(zip(("da", "dup", "dup_bias"), gradients, strict=True))
    assert_exact(found, reference, dtype)  # type: ignore[arg-type]
