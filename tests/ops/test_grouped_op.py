"""LoRA on groups of tokens, each with a weight of its own: against the formula, group by group, in fp64.

On the CPU: torch's grouped GEMMs take bf16 alone on a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bench.saved import count
from fastpeft.errors import BackendError
from fastpeft.ops.grouped import grouped_lora
from tests.tolerance import assert_within_rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(5, 0, 17, 1), (3,), (0, 40)]
SCALING = 1.5


def problem(sizes, r: int, dtype: torch.dtype, adapter: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, W, L and R, and where each group ends; x has two more tokens, of no group."""
    generator = torch.Generator().manual_seed(0)
    groups, k, n = len(sizes), 24, 40

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, weight = normal(sum(sizes) + 2, k).to(dtype), normal(groups, n, k).to(dtype).mT
    left, right = normal(groups, r, k).to(adapter).mT, normal(groups, r, n).to(adapter)
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return [x, weight, left, right], offs


def reference(x: Tensor, weight: Tensor, left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    rows = [x[a:b] for a, b in itertools.pairwise([0, *offs.tolist()])]
    return torch.cat(
        [r @ w + SCALING * ((r @ a) @ b) for r, w, a, b in zip(rows, weight, left, right, strict=True)]
    )


def run(function, tensors, offs, dtype=None, *, weight_trains=False):
    """The result and the gradients of all that trains; without the tokens of no group, left undefined."""
    leaves = [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
    leaves[1].requires_grad_(weight_trains)
    y = function(*leaves, offs)[: offs[-1]]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    dx, *gradients = torch.autograd.grad(y, trained, dy)
    return [y, dx[: offs[-1]], *gradients]


def ours(x: Tensor, weight: Tensor, left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    return grouped_lora(x, weight, left, right, offs, scaling=SCALING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 8, 19])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("adapter", [torch.float32, None], ids=["fp32-adapters", "same"])
def test_two_times_rule(sizes, r, dtype, adapter):
    tensors, offs = problem(sizes, r, dtype, adapter or dtype)
    results = run(ours, tensors, offs)
    exact = run(reference, tensors, offs, torch.float64)
    plain = run(reference, tensors, offs, dtype)
    for name, found, expected, baseline in zip(
        ("y", "x", "left", "right"), results, exact, plain, strict=True
    ):
        assert_within_rule(found, expected, baseline, name)
    assert [g.dtype for g in results] == [dtype, dtype, adapter or dtype, adapter or dtype]


def test_the_tokens_of_no_group_have_no_part_in_any_gradient():
    tensors, offs = problem((4, 6), 8, torch.float32, torch.float32)
    expected = run(ours, tensors, offs)
    tensors[0][10:] = float("nan")
    torch.testing.assert_close(run(ours, tensors, offs), expected, rtol=0, atol=0)


def test_a_weight_that_trains_gets_its_gradient():
    tensors, offs = problem((4, 6), 3, torch.float32, torch.float32)
    found = run(ours, tensors, offs, weight_trains=True)
    expected = run(reference, tensors, offs, weight_trains=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("r", [8, 3])
def test_s_is_all_that_is_kept(r):
    (x, weight, left, right), offs = problem((40, 24), r, torch.bfloat16, torch.float32)
    given = [x.requires_grad_(), weight, left.requires_grad_(), right.requires_grad_(), offs]
    kept, _ = count(lambda: ours(*given).sum(), given)
    assert kept == 4 * 66 * 8  # S, in fp32 on a CPU, of whole 16 bytes a row


@pytest.mark.parametrize("r", [8, 3])
def test_second_derivatives(r):
    tensors, offs = problem((40, 24), r, torch.float32, torch.float32)

    def penalty(function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in tensors]
        leaves[1].requires_grad_(False)
        trained = [leaves[0], *leaves[2:]]
        loss = function(*leaves, offs)[: offs[-1]].square().sum()
        first = torch.autograd.grad(loss, trained, create_graph=True)
        return [g[: offs[-1]] for g in torch.autograd.grad(sum(g.square().sum() for g in first), trained)]

    exact = penalty(reference, torch.float64)
    for found, expected, baseline in zip(penalty(ours), exact, penalty(reference), strict=True):
        assert_within_rule(found, expected, baseline, "second derivative")


@pytest.mark.parametrize("trained", [(0, 3), (3,), (0, 2), (2, 3)], ids=str)
def test_first_gradients_on_the_way_to_second_ones(trained):
    """x is not kept where only the right factor trains: the second derivative is refused, not 0."""
    tensors, offs = problem((40, 24), 3, torch.float32, torch.float32)
    for i in trained:
        tensors[i].requires_grad_()
    leaves = [tensors[i] for i in trained]
    loss = ours(*tensors, offs)[: offs[-1]].square().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    expected = torch.autograd.grad(reference(*tensors, offs).square().sum(), leaves)
    for found, right in zip(first, expected, strict=True):
        torch.testing.assert_close(found[: offs[-1]], right[: offs[-1]], rtol=1e-4, atol=1e-3)
    if 3 in trained and 2 not in trained:
        with pytest.raises(BackendError, match="x is not kept"):
            sum(g.square().sum() for g in first).backward()


def test_under_torch_func():
    tensors, offs = problem((4, 6), 3, torch.float32, torch.float32)
    (x, weight, left, right) = tensors

    def loss(function, left: Tensor) -> Tensor:
        return function(x, weight, left, right, offs)[: offs[-1]].square().sum()

    found, expected = (torch.func.grad(lambda t, f=f: loss(f, t))(left) for f in (ours, reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
