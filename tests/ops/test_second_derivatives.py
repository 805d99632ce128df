"""Second derivatives are the formula's, or an error; never a part of the sum.

``create_graph=True`` differentiates the references (:mod:`fastpeft.ops.second_order`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastpeft
from fastpeft.layers.vera import scaled_b
from fastpeft.ops.bottleneck import bottleneck
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.gated_mlp import gated_mlp
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_add import lora_add
from fastpeft.ops.stacked import stacked_linear
from fastpeft_kernels.projection import Projection

K, R = 5, 2
Op = Callable[..., Tensor]


def weight(seed: int = 0) -> Tensor:
    return torch.randn(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# DoRA's norm is a constant of the formula; given, it is one of the finite differences too.
NORM = torch.linspace(1.0, 2.0, K, dtype=torch.float64)


def lora(A: Tensor, B: Tensor, seed: int = 0) -> Projection:
    return Projection(weight=weight(seed), lora_A=A, lora_B=B, scaling=2.0)


def dora(A: Tensor, B: Tensor, m: Tensor, bias: Tensor | None = None) -> Projection:
    of_dora = {"magnitude": m, "norm": NORM}
    return Projection(weight=weight(1), bias=bias, lora_A=A, lora_B=B, scaling=2.0, **of_dora)


def stacked(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, m: Tensor, p: float = 0.0) -> Tensor:
    plain = Projection(weight=weight(3), lora_A=None, lora_B=None, scaling=0.0)
    projections = [lora(A, B), plain, dora(A, B, m, bias)]
    return torch.cat(stacked_linear(x, projections, dropout_p=p, dropout_on_base=False))


def mlp(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, m: Tensor, p: float = 0.0) -> Tensor:
    projections = lora(A, B), dora(A, B, m), dora(A, B, m, bias)
    return gated_mlp(x, *projections, dropout_p=p, dropout_on_base=False)


def single_dora(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, m: Tensor, p: float = 0.0) -> Tensor:
    return dora_linear(x, weight(), bias, A, B, m, scaling=2.0, norm=NORM, dropout_p=p)


OPS: dict[str, Op] = {
    "lora": lambda x, A, B, b, m, p=0.0: lora_linear(x, weight(), b, A, B, scaling=2.0, dropout_p=p),
    "dora": single_dora,
    "lora_add": lambda x, A, B, b, m, p=0.0: lora_add(x.sin(), x, A, B, scaling=2.0, dropout_p=p),
    "stacked": stacked,
    "gated_mlp": mlp,
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def leaves() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 3, K), (R, K), (K, R), (K,), (K,))
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@every_op
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_against_finite_differences(op: Op, p: float):
    def repeatable(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask at every call
        return op(*tensors, p=p)

    assert torch.autograd.gradgradcheck(repeatable, leaves(), atol=1e-6)


@every_op
def test_a_graph_of_the_backward_has_its_gradients(op: Op):
    tensors = leaves()
    first = torch.autograd.grad(op(*tensors).square().sum(), tensors, allow_unused=True)
    again = torch.autograd.grad(op(*tensors).square().sum(), tensors, allow_unused=True, create_graph=True)
    for got, want in zip(again, first, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


def test_a_shared_adapter_is_differentiated_in_each_place_by_itself():
    def twice(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        for i in range(2):
            x = lora_linear(x, weight(i), None, A, B, scaling=2.0).tanh()
        return x

    assert torch.autograd.gradgradcheck(twice, leaves()[:3], atol=1e-6)


@every_op
def test_many_gradients_at_once(op: Op):
    tensors = leaves()
    y = op(*tensors)
    dys = torch.randn(4, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad(
        y, tensors, dys, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    one_by_one = [torch.autograd.grad(y, tensors, dy, retain_graph=True, allow_unused=True) for dy in dys]
    for got, *want in zip(together, *one_by_one, strict=True):
        if got is not None:
            torch.testing.assert_close(got, torch.stack(want))


@every_op
def test_of_a_lora_b_that_is_kept_as_its_factors(op: Op):
    """VeRA's; A trains here, so that x is kept."""
    x, A, shared, bias, m = leaves()
    shared = shared.detach()
    vectors = [torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (K, R)]

    def of_vera(x: Tensor, A: Tensor, b: Tensor, d: Tensor) -> Tensor:
        return op(x, A, scaled_b(b, shared, d), bias, m)

    assert torch.autograd.gradgradcheck(of_vera, [x, A, *vectors], atol=1e-6)


def with_a_frozen_lora_a(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return lora_linear(x, weight(), None, A.detach(), B, scaling=2.0)


def a_bottleneck(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    biases = x.new_zeros(R), x.new_zeros(K)
    return bottleneck(x, x, A, biases[0], B, biases[1], non_linearity="relu", scaling=1.0)


@pytest.mark.parametrize("op", [with_a_frozen_lora_a, a_bottleneck])
@pytest.mark.parametrize("by", ["grad", "backward", "backward with inputs"])
def test_what_is_unknown_is_an_error(op: Op, by: str):
    x, A, B, *_ = leaves()
    (dx,) = torch.autograd.grad(op(x, A, B).square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(op(x, A, B).square().sum(), x)
    assert torch.equal(dx, plain)
    penalty = dx.square().sum()
    take = {
        "grad": lambda: torch.autograd.grad(penalty, [B]),
        "backward": penalty.backward,
        "backward with inputs": lambda: penalty.backward(inputs=[B]),
    }
    with pytest.raises(fastpeft.BackendError, match="cannot be differentiated twice"):
        take[by]()


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_gradient_penalty_trains_a_model_as_pefts_does(use_dora: bool):
    peft = pytest.importorskip("peft")

    def gradients(accelerates: bool) -> list[Tensor]:
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=use_dora, init_lora_weights=False)
        model = peft.get_peft_model(base, config)
        if accelerates:
            fastpeft.patch(model)
        x = torch.randn(4, 8, requires_grad=True)
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        return list(torch.autograd.grad((dx.norm(dim=1) - 1).square().sum(), trained))

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
