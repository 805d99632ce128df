"""The bottleneck op: by the formula in fp64, what it keeps, and how compilers and transforms see it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch.func import grad

import fastpeft
from bench.saved import count
from fastpeft.ops.bottleneck import NonLinearity, bottleneck, bottleneck_reference
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.tolerance import assert_within_rule

pytestmark = pytest.mark.usefixtures("backend")
NAMES = get_args(NonLinearity)
NUMBERS = ("y", "dbase", "dx", "ddown", "ddown_bias", "dup", "dup_bias")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with interpreter.mended(), fastpeft.use_backend(request.param):
        yield request.param


def tensors(shape, in_features, size, out_features, *, adapter=torch.float32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(*shape, out_features, generator=generator)
    x = torch.randn(*shape, in_features, generator=generator)
    parameters = [
        torch.randn(*s, generator=generator) / s[-1] ** 0.5
        for s in ((size, in_features), (size,), (out_features, size), (out_features,))
    ]
    return [base.to(DEVICE, dtype), x.to(DEVICE, dtype), *(p.to(DEVICE, adapter) for p in parameters)]


def gradients(function, inputs, dy, dtype=None):
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = function(*inputs)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in inputs)]


def in_series(function):
    """The function of base and the parameters; its x is the base."""
    return lambda base, *parameters: function(base, base, *parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("non_linearity", NAMES)
@pytest.mark.parametrize("series", [True, False], ids=["series", "parallel"])
def test_by_the_formula(series, non_linearity, dtype):
    options = {"non_linearity": non_linearity, "scaling": 1.5}
    everything = tensors((3, 21), 24, 10, 24 if series else 15, dtype=dtype)
    dy = torch.randn(everything[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def reference(base, x, *parameters):
        return bottleneck_reference(base, x, *parameters, **options)

    def ours(base, x, *parameters):
        return bottleneck(base, None if series else x, *parameters, **options)

    names = list(NUMBERS)
    if series:
        del everything[1], names[2]
        reference, ours = in_series(reference), in_series(ours)
    found = gradients(ours, everything, dy)
    exact = gradients(reference, everything, dy, torch.float64)
    plain = gradients(reference, everything, dy, dtype)
    for what, mine, right, usual in zip(names, found, exact, plain, strict=True):
        assert_within_rule(mine, right, usual, what)
    assert all(g.dtype is torch.float32 for g in found[-4:])


@pytest.mark.parametrize("scaling", [1.0, 1.5])
@pytest.mark.parametrize("non_linearity", NAMES)
@pytest.mark.parametrize("series", [True, False], ids=["series", "parallel"])
def test_gradients_by_differences(series, non_linearity, scaling, backend):
    if backend == "triton":
        pytest.skip("the kernels take no fp64")
    f64 = torch.float64
    everything = tensors((2, 3), 5, 4, 5 if series else 3, adapter=f64, dtype=f64)
    if series:
        del everything[1]

    def function(base, *rest):
        given = (None, *rest) if series else rest
        return bottleneck(base, *given, non_linearity=non_linearity, scaling=scaling)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in everything])


@pytest.mark.parametrize("non_linearity", NAMES)
@pytest.mark.parametrize("series", [True, False], ids=["series", "parallel"])
def test_what_is_kept(series, non_linearity, backend):
    T, size = 512, 6
    base, x, *parameters = tensors((T,), 20, size, 20)
    leaf = torch.randn(T, 20).to(DEVICE).requires_grad_()
    options = {"non_linearity": non_linearity, "scaling": 1.0}

    def kept(*, trained):
        for parameter in parameters:
            parameter.requires_grad_(trained)
        given = None if series else x
        saved, live = count(
            lambda: bottleneck(leaf + base, given, *parameters, **options).sum(), [leaf, base, x, *parameters]
        )
        if backend == "torch":  # the interpreter holds memory of its own
            assert live == saved
        return saved

    bytes_of_size, bytes_of_output = T * size * 4, T * 20 * 4
    own = bytes_of_size + (bytes_of_output if series else 0)  # x of a parallel one is there anyway
    assert kept(trained=True) == own
    assert kept(trained=False) == bytes_of_size  # no input where nothing trains


def test_nothing_is_kept_where_nothing_wants_a_gradient():
    base, x, *parameters = tensors((64,), 20, 6, 20)
    y = bottleneck(base, x, *parameters, non_linearity="gelu", scaling=1.0)
    assert y.grad_fn is None
    parameters[3].requires_grad_()
    y = bottleneck(base, x, *parameters, non_linearity="gelu", scaling=1.0)
    y.sum().backward()
    assert torch.equal(parameters[3].grad, torch.full((20,), 64.0, device=DEVICE))


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0, 3), (2, 3)], ids=str)
def test_shapes(shape):
    base, x, *parameters = tensors(shape, 5, 3, 7)
    strided = torch.empty(*shape, 10, device=DEVICE)[..., ::2].copy_(x).requires_grad_()
    y = bottleneck(base, strided, *parameters, non_linearity="silu", scaling=2.0)
    expected = bottleneck_reference(base, x, *parameters, "silu", 2.0)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert strided.grad.shape == x.shape


@pytest.mark.parametrize("series", [True, False], ids=["series", "parallel"])
def test_compiled_and_transformed(series, backend):
    base, x, *parameters = tensors((4, 9), 12, 5, 12)

    def loss(base, x, *parameters):
        given = None if series else x
        return bottleneck(base, given, *parameters, non_linearity="gelu", scaling=1.5).square().sum()

    everything = (base, x, *parameters)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eager = gradients(loss, everything, torch.ones((), device=DEVICE))
    traced = gradients(compiled, everything, torch.ones((), device=DEVICE))
    transformed = grad(loss, argnums=tuple(range(6)))(*everything)
    for place, (a, b) in enumerate(zip(eager, traced, strict=True)):
        if a is None:
            assert b is None
            continue
        torch.testing.assert_close(a, b)
        if place:
            torch.testing.assert_close(a, transformed[place - 1], rtol=1e-4, atol=1e-4)
    torch.library.opcheck(
        torch.ops.fastpeft.bottleneck.default,
        (base, None if series else x, *(p.requires_grad_() for p in parameters), "tanh", 1.5, backend),
    )


def test_autocast_takes_the_outputs_dtype():
    base, x, *parameters = tensors((4, 9), 12, 5, 7)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = bottleneck(base.bfloat16(), x, *parameters, non_linearity="relu", scaling=1.0)
    assert y.dtype is torch.bfloat16


def test_what_does_not_fit_is_named():
    base, x, *parameters = tensors((4,), 12, 5, 7)
    with pytest.raises(fastpeft.ShapeError, match=r"got x \[4, 7\], base \[4, 7\] and \[5, 12\], \[5\]"):
        bottleneck(base, None, *parameters, non_linearity="relu", scaling=1.0)
    with pytest.raises(fastpeft.ShapeError, match=r"x with base's leading sizes"):
        bottleneck(base[:3], x, *parameters, non_linearity="relu", scaling=1.0)
