"""No op has a second derivative; asking for one is an error, and never a wrong number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastpeft.ops.dora import dora_linear
from fastpeft.ops.gated_mlp import gated_mlp
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_add import lora_add
from fastpeft.ops.stacked import stacked_linear
from fastpeft_kernels.projection import Projection
from tests.device import DEVICE

K = 6


def projection(A: Tensor, B: Tensor) -> Projection:
    return Projection(weight=torch.eye(K, device=DEVICE), lora_A=A, lora_B=B, scaling=2.0)


OPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "lora": lambda x, A, B: lora_linear(x, torch.eye(K, device=DEVICE), None, A, B, scaling=2.0),
    "dora": lambda x, A, B: dora_linear(
        x, torch.eye(K, device=DEVICE), None, A, B, torch.ones(K, device=DEVICE), scaling=2.0
    ),
    "lora_add": lambda x, A, B: lora_add(x, x, A, B, scaling=2.0),
    "stacked": lambda x, A, B: sum(stacked_linear(x, [projection(A, B), projection(A, B)])),
    "gated_mlp": lambda x, A, B: gated_mlp(x, *[projection(A, B)] * 3),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_graph_of_the_backward_cannot_be_differentiated(op):
    torch.manual_seed(0)
    leaves = [torch.randn(*shape).to(DEVICE).requires_grad_() for shape in ((3, K), (2, K), (K, 2))]
    first = torch.autograd.grad(op(*leaves).square().sum(), leaves)
    kept = torch.autograd.grad(op(*leaves).square().sum(), leaves, create_graph=True)
    for got, want in zip(kept, first, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient.sum() for gradient in kept).backward()
