"""LoRA's update on a given base product, on both backends: formula, gradients, dropout, memory, compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastpeft
from fastpeft.ops.dropout import draw_seeds, dropout_mask
from fastpeft.ops.lora_add import lora_add, lora_add_reference
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.tolerance import assert_within_rule

SCALING = 0.7
NAMES = ("base", "x", "lora_A", "lora_B")
# batch dimensions, in_features, out_features, rank
SHAPES = [
    pytest.param((8,), 16, 32, 4, id="aligned"),
    pytest.param((3, 5), 23, 37, 5, id="ragged-3d"),
    pytest.param((37,), 24, 20, 40, id="rank-above-features"),
    pytest.param((2, 0), 12, 10, 3, id="zero-tokens-3d"),
]


@pytest.fixture(params=["torch-native", "torch-fp32", "torch-few", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, force_products) -> Iterator[str]:
    name, _, way = request.param.partition("-")
    force_products(way)
    with interpreter.mended(), fastpeft.use_backend(name):
        yield name


def problem(batch, k, n, r, dtype, adapter=None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(k * 31 + n * 7 + r)
    return {
        "base": torch.randn(*batch, n, generator=g).to(DEVICE, dtype),
        "x": torch.randn(*batch, k, generator=g).to(DEVICE, dtype),
        "lora_A": (torch.randn(r, k, generator=g) / k**0.5).to(DEVICE, adapter or dtype),
        "lora_B": (torch.randn(n, r, generator=g) / r**0.5).to(DEVICE, adapter or dtype),
    }


def run(tensors: dict[str, Tensor], function, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return y and the gradients of all four for one fixed dY."""
    cast = [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in tensors.values()]
    y = function(*cast)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    dy = dy.to(DEVICE, tensors["x"].dtype).to(y.dtype)
    return [y, *torch.autograd.grad(y, cast, dy)]


def reference(*tensors: Tensor) -> Tensor:
    return lora_add_reference(*tensors, SCALING)


@pytest.mark.parametrize("adapter", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "k", "n", "r"), SHAPES)
def test_two_times_rule(batch, k, n, r, dtype, adapter):
    tensors = problem(batch, k, n, r, dtype, torch.float32 if adapter == "fp32" else None)
    results = run(tensors, lambda *t: lora_add(*t, scaling=SCALING))
    exact, plain = run(tensors, reference, torch.float64), run(tensors, reference, dtype)
    for name, result, expected, baseline in zip(("y", *NAMES), results, exact, plain, strict=True):
        assert_within_rule(result, expected, baseline, name)
    wanted = [t.dtype for t in (tensors["base"], *tensors.values())]
    assert [result.dtype for result in results] == wanted


@pytest.mark.parametrize("overwrite", [False, True])
def test_base_is_overwritten_only_where_allowed(overwrite):
    tensors = problem((4, 6), 16, 24, 4, torch.float32)
    leaves = [tensors[name].requires_grad_() for name in NAMES[1:]]
    weight = torch.randn(24, 16).to(DEVICE)
    base = torch.nn.functional.linear(tensors["x"], weight)
    before, address = base.detach().clone(), base.data_ptr()
    y = lora_add(base, *leaves, scaling=SCALING, overwrite=overwrite)
    assert (y.data_ptr() == address) is overwrite
    if not overwrite:
        assert torch.equal(base, before)
    expected = reference(torch.nn.functional.linear(tensors["x"], weight), *leaves)
    for got, want in zip(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_view_is_never_overwritten():
    tensors = problem((4,), 16, 24, 4, torch.float32)
    owner = tensors["base"].clone()
    lora_add(owner[:], *(tensors[n] for n in NAMES[1:]), scaling=SCALING, overwrite=True)
    assert torch.equal(owner, tensors["base"])


def test_dropout_is_drawn_again_in_backward(backend):
    tensors = problem((6, 7), 16, 12, 4, torch.float32)
    leaves = [tensors[n].requires_grad_() for n in NAMES]
    torch.manual_seed(1)
    y = lora_add(*leaves, scaling=SCALING, dropout_p=0.4)
    if backend == "torch":  # the kernel's own mask is checked against its formula in tests/kernels
        torch.manual_seed(1)
        seed = draw_seeds(tensors["x"], [0.4], "torch")
        mask = dropout_mask(tensors["x"].reshape(-1, 16), 0.4, seed).view(6, 7, 16)
        expected = lora_add_reference(*leaves, SCALING, mask)
        torch.testing.assert_close(y, expected)
        for got, want in zip(
            torch.autograd.grad(y.square().sum(), leaves, retain_graph=True),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
    # Linear in lora_B, in lora_A and in x for a fixed mask: one that changed would break these identities.
    gradients = torch.autograd.grad(y.sum(), leaves)
    added = (y - leaves[0]).sum()
    for gradient, leaf in zip(gradients[1:], leaves[1:], strict=True):
        torch.testing.assert_close((gradient * leaf).sum(), added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", NAMES)
def test_only_the_gradient_asked_for(trained):
    tensors = problem((3, 4), 10, 12, 3, torch.float32)
    tensors[trained].requires_grad_()
    lora_add(*tensors.values(), scaling=SCALING).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [trained]
    (expected,) = torch.autograd.grad(reference(*tensors.values()).sum(), tensors[trained])
    torch.testing.assert_close(tensors[trained].grad, expected)


def test_what_is_saved(backend):
    """S, the adapter and x where lora_A trains; no [tokens, out_features] tensor, no copy of x."""
    tensors = problem((64,), 32, 48, 2, torch.bfloat16, torch.float32)
    for train_A in (True, False):
        saved: list[Tensor] = []
        leaves = {name: t.clone() for name, t in tensors.items()}
        leaves["lora_A"].requires_grad_(train_A)
        leaves["lora_B"].requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            lora_add(*leaves.values(), scaling=SCALING, dropout_p=0.1)
        shapes = sorted(tuple(t.shape) for t in saved)
        assert shapes == sorted([(64, 2), (2, 32), (48, 2), (1,)] + [(64, 32)] * train_A)


def test_compiles_whole_and_passes_opcheck(backend):
    tensors = problem((3, 5), 16, 24, 4, torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(
        torch.ops.fastpeft.lora_add.default,
        (*leaves, SCALING, [0.0], None, None, backend),
        raise_exception=True,
    )
    compiled = torch.compile(
        lambda *t: lora_add(*t, scaling=SCALING, overwrite=True), fullgraph=True, backend="aot_eager"
    )
    for got, want in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(reference(*leaves).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_gradcheck(backend):
    if backend == "triton":
        pytest.skip("the kernels have no fp64")
    leaves = [t.requires_grad_() for t in problem((3,), 5, 4, 2, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *t: lora_add(*t, scaling=SCALING), leaves)


def test_wrong_shapes_are_named():
    tensors = problem((3,), 10, 12, 3, torch.float32)
    with pytest.raises(fastpeft.ShapeError, match=r"expected base \[..., out_features\].*base \[2, 12\]"):
        lora_add(tensors["base"][:2], *(tensors[n] for n in NAMES[1:]), scaling=1.0)
    with pytest.raises(fastpeft.ShapeError, match=r"lora_A \[r, in_features\], got x \[3, 9\]"):
        lora_add(tensors["base"], tensors["x"][:, :9], tensors["lora_A"], tensors["lora_B"], scaling=1.0)
    with pytest.raises(fastpeft.ShapeError, match=r"base's dtype torch.float32, got torch.bfloat16"):
        lora_add(tensors["base"], tensors["x"].bfloat16(), *list(tensors.values())[2:], scaling=1.0)
