"""The LN-LoRA op: by the formula in fp64, what it keeps, and how compilers and transforms see it."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad

import fastpeft
from bench.saved import count
from fastpeft.ops.ln_lora import ln_lora, ln_lora_reference
from tests.tolerance import assert_within_rule

NUMBERS = ("y", "dbase", "dx", "dA", "dweight", "dbias", "dB")


def tensors(shape, in_features, r, out_features, *, adapter=torch.float32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(*shape, out_features, generator=generator)
    x = torch.randn(*shape, in_features, generator=generator)
    A = torch.randn(r, in_features, generator=generator) / in_features**0.5
    weight = 1 + 0.3 * torch.randn(r, generator=generator)
    bias = 0.3 * torch.randn(r, generator=generator)
    B = torch.randn(out_features, r, generator=generator) / r**0.5
    return [base.to(dtype), x.to(dtype), *(p.to(adapter) for p in (A, weight, bias, B))]


def gradients(function, inputs, dy, dtype=None):
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    y = function(*inputs)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 21), (63,)], ids=str)
def test_by_the_formula(shape, dtype):
    everything = tensors(shape, 24, 6, 15, dtype=dtype)
    dy = torch.randn(everything[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def reference(*inputs):
        return ln_lora_reference(*inputs, 1.5)

    found = gradients(lambda *inputs: ln_lora(*inputs, scaling=1.5), everything, dy)
    exact = gradients(reference, everything, dy, torch.float64)
    plain = gradients(reference, everything, dy, dtype)
    for what, mine, right, usual in zip(NUMBERS, found, exact, plain, strict=True):
        assert_within_rule(mine, right, usual, what)
    assert all(g.dtype is torch.float32 for g in found[-4:])


def test_the_reference_is_the_formula():
    base, x, A, g, b, B = tensors((7,), 9, 4, 5, adapter=torch.float64, dtype=torch.float64)
    h = x @ A.T
    centred = h - h.mean(1, keepdim=True)
    n = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * g + b
    torch.testing.assert_close(ln_lora_reference(base, x, A, g, b, B, 0.5), base + 0.5 * n @ B.T)


def test_gradients_by_differences():
    everything = [
        t.requires_grad_() for t in tensors((2, 3), 5, 4, 6, adapter=torch.float64, dtype=torch.float64)
    ]
    assert torch.autograd.gradcheck(lambda *inputs: ln_lora(*inputs, scaling=1.5), everything)


@pytest.mark.parametrize("place", range(6), ids=NUMBERS[1:])
def test_one_gradient_alone(place):
    everything = tensors((4, 3), 5, 4, 6)
    whole = gradients(lambda *inputs: ln_lora(*inputs, scaling=1.5), everything, torch.ones(4, 3, 6))
    everything[place].requires_grad_()
    ln_lora(*everything, scaling=1.5).sum().backward()
    torch.testing.assert_close(everything[place].grad, whole[place + 1])
    assert [t.grad is None for t in everything] == [i != place for i in range(6)]


def test_what_is_kept():
    T, r = 512, 6
    base, x, *parameters = tensors((T,), 20, r, 30)
    leaf = torch.randn(T, 30, requires_grad=True)

    def kept(*, trained):
        for parameter in parameters:
            parameter.requires_grad_(trained)
        return count(
            lambda: ln_lora(leaf + base, x, *parameters, scaling=1.0).sum(), [leaf, base, x, *parameters]
        )

    own = T * (r + 2) * 4  # h, mean and deviation; neither the output nor the normalised h
    assert kept(trained=True) == (own, own)
    assert kept(trained=False) == (own, own)
    made = torch.randn(T, 20)
    frozen = [p.requires_grad_(False) for p in parameters]
    assert count(
        lambda: ln_lora(leaf + base, made + 1, *frozen, scaling=1.0).sum(), [leaf, base, *parameters]
    ) == (
        own,
        own,
    ), "no input where A is frozen"


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0, 3), (2, 3)], ids=str)
def test_shapes(shape):
    base, x, *parameters = tensors(shape, 5, 3, 7)
    strided = torch.empty(*shape, 10)[..., ::2].copy_(x).requires_grad_()
    y = ln_lora(base, strided, *parameters, scaling=2.0)
    torch.testing.assert_close(y, ln_lora_reference(base, x, *parameters, 2.0))
    y.sum().backward()
    assert strided.grad.shape == x.shape


def test_compiled_and_transformed():
    everything = tensors((4, 9), 12, 5, 7)

    def loss(*inputs):
        return ln_lora(*inputs, scaling=1.5).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    eager = gradients(loss, everything, torch.ones(()))
    traced = gradients(compiled, everything, torch.ones(()))
    transformed = grad(loss, argnums=tuple(range(6)))(*everything)
    for place, (a, b) in enumerate(zip(eager, traced, strict=True)):
        torch.testing.assert_close(a, b)
        if place:
            torch.testing.assert_close(a, transformed[place - 1], rtol=1e-4, atol=1e-4)
    torch.library.opcheck(
        torch.ops.fastpeft.ln_lora.default, (*(t.requires_grad_() for t in everything), 1.5)
    )


def test_autocast_takes_the_outputs_dtype_and_normalises_in_fp32():
    base, x, *parameters = tensors((4, 9), 12, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = ln_lora(base.bfloat16(), x, *parameters, scaling=1.0)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, ln_lora(base.bfloat16(), x.bfloat16(), *parameters, scaling=1.0))


def test_what_does_not_fit_is_named():
    base, x, *parameters = tensors((4,), 12, 5, 7)
    with pytest.raises(fastpeft.ShapeError, match=r"got x \[4, 7\], base \[4, 7\] and \[5, 12\], \[5\]"):
        ln_lora(base, base, *parameters, scaling=1.0)
    with pytest.raises(fastpeft.ShapeError, match="x with base's leading sizes"):
        ln_lora(base[:3], x, *parameters, scaling=1.0)
    with pytest.raises(fastpeft.ShapeError, match=r"parameters of one dtype, got torch\.float64"):
        ln_lora(base, x, parameters[0].double(), *parameters[1:], scaling=1.0)
    with pytest.raises(fastpeft.ShapeError, match="with r of at least 2"):
        ln_lora(*tensors((4,), 12, 1, 7), scaling=1.0)
