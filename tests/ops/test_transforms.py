"""``torch.func`` sees through the ops: gradients, per-sample gradients and Jacobian-vector products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpeft.ops.dora import dora_linear
from fastpeft.ops.lora import lora_linear
from tests.device import DEVICE


def layer(dora: bool):
    g = torch.Generator().manual_seed(0)
    weight, magnitude = torch.randn(7, 6, generator=g), 1 + torch.rand(7, generator=g)
    lora_A, lora_B = torch.randn(3, 6, generator=g), torch.randn(7, 3, generator=g)

    weight, magnitude, lora_A, lora_B = (t.to(DEVICE) for t in (weight, magnitude, lora_A, lora_B))

    def call(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        if dora:
            return dora_linear(x, weight, None, lora_A, lora_B, magnitude, scaling=0.5)
        return lora_linear(x, weight, None, lora_A, lora_B, scaling=0.5)

    return call, torch.randn(5, 6, generator=g).to(DEVICE), lora_A, lora_B


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_grad_vmap_and_jvp(dora):
    call, x, lora_A, lora_B = layer(dora)

    def loss(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return call(x, lora_A, lora_B).square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, lora_A, lora_B)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(x, lora_A, lora_B), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=2), in_dims=(0, None, None))
    torch.testing.assert_close(per_sample(x[:, None], lora_A, lora_B).sum(0), expected[2])
    _, forward_mode = torch.func.jvp(lambda x: loss(x, lora_A, lora_B), (x,), (x,))
    torch.testing.assert_close(forward_mode, (expected[0] * x).sum())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_forward_mode(dora):
    call, *tensors = layer(dora)
    directions = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) for t in tensors
    ]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    direction = torch.ones_like(y)
    expected = sum(
        (g * d).sum() for g, d in zip(torch.autograd.grad(y, leaves, direction), directions, strict=True)
    )
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions, strict=True)]
        found = forward_ad.unpack_dual(call(*duals)).tangent
    torch.testing.assert_close(found.sum(), expected)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_gradient_of_a_dy_with_a_tangent(dora, shape):
    call, _, *adapter = layer(dora)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    y = call(x, *adapter)
    dy, tangent = torch.ones_like(y), 2 * torch.ones_like(y)
    (expected,) = torch.autograd.grad(y, x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dx).tangent, expected)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_compiled_graph_holds_the_op(dora):
    call, *tensors = layer(dora)
    targets: list[str] = []

    def backend(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), call(*tensors))
    assert any(f"fastpeft.{'dora' if dora else 'lora'}_linear" in target for target in targets), targets
