"""The stand-in for ``W + s L R`` by itself (tests/in_place/test_parameters.py: inside PEFT's models)."""

from __future__ import annotations

import pytest
import torch

from fastpeft.layers.factored import FactoredWeight
from tests.in_place.own_product import OwnProduct


def test_gradients_that_arrive_for_the_weight_as_a_whole():
    tensors = [torch.randn(shape, dtype=torch.double) for shape in ((3, 6, 5), (3, 6, 2), (3, 2, 5), (4, 5))]
    leaves = [t.requires_grad_() for t in tensors]

    def product(weight, left, right, x):
        stand_in = FactoredWeight.of(weight, left, right, 0.7)
        assert stand_in.requires_grad
        assert not stand_in.is_leaf
        return OwnProduct.apply(x, stand_in) + OwnProduct.apply(x, stand_in.transposed()[0].mT[None])

    assert torch.autograd.gradcheck(product, leaves)


def test_no_gradient_for_the_weight_is_none_for_the_factors():
    class Frozen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x @ weight[0].T

        @staticmethod
        def backward(ctx, dy):
            return dy @ ctx.saved_tensors[0][0], None

    weight, left, right = (torch.randn(shape).requires_grad_() for shape in ((3, 6, 5), (3, 6, 2), (3, 2, 5)))
    x = torch.randn(4, 5, requires_grad=True)
    Frozen.apply(x, FactoredWeight.of(weight, left, right, 0.7)).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 6) @ (weight + 0.7 * left @ right)[0])
    assert weight.grad is left.grad is right.grad is None


def test_looked_at_without_gradients_first():
    """As with any tensor that has a graph; PEFT keeps what the first look made of it."""
    tensors = [torch.randn(shape, dtype=torch.double) for shape in ((3, 6, 5), (3, 6, 2), (3, 2, 5), (4, 5))]
    x = tensors.pop()

    def gradients(make) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        weight = make(*leaves)
        with torch.no_grad():
            size, part = weight.abs().max() + weight[0].sum(), weight[1]
        y = (x @ weight[0].T + x @ part.T + weight.mean() + weight[1].sum()) * size
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    torch.testing.assert_close(
        gradients(lambda *leaves: FactoredWeight.of(*leaves, 0.7)),
        gradients(lambda weight, left, right: weight + 0.7 * left @ right),
    )


def test_past_torch_functions_the_stand_in_refuses():
    weight = FactoredWeight.of(torch.randn(3, 4), torch.randn(3, 2), torch.randn(2, 4), 1.0)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match="stand-in"):
        torch.add(weight, 1)
