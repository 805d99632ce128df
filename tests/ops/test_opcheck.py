"""``torch.library.opcheck`` of every custom op there is, backwards included, on arguments from real calls.

A dispatch mode makes the functional entries go through their custom ops, forward and backward, and records
what those are called with; the record is then checked: schema, registered autograd, fake implementation, and
tracing with dynamic shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fastpeft
from fastpeft.ops.bottleneck import bottleneck
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.gated_mlp import gated_mlp
from fastpeft.ops.ln_lora import ln_lora
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_add import lora_add
from fastpeft.ops.probability import LiveProbability
from fastpeft.ops.projections import with_norm
from fastpeft.ops.stacked import stacked_linear
from fastpeft.ops.subspace import coordinates
from fastpeft.ops.subspace_embedding import subspace_embedding
from fastpeft.ops.subspace_linear import subspace_linear
from fastpeft.ops.subspace_weight import subspace_weight
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.ops.blocks import leaves, projection
from tests.ops.projections import projection_of

Call = Callable[[], Tensor | tuple[Tensor, ...]]
K, N, R = 10, 12, 3


class Recorder(TorchDispatchMode):
    """The arguments of the first call of every custom op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpeft":
            self.calls.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def tensor(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()


def linear() -> tuple[Tensor, ...]:
    """x, weight, bias, lora_A, lora_B."""
    return tensor(2, 3, K), tensor(N, K).requires_grad_(False), tensor(N), tensor(R, K), tensor(N, R)


def lora(p: Any) -> Call:
    return lambda: lora_linear(*linear(), scaling=0.7, dropout_p=p)


def dora(p: Any, on_base: bool = True) -> Call:
    return lambda: dora_linear(
        *linear(), tensor(N, seed=1), scaling=0.7, dropout_p=p, dropout_on_base=on_base
    )


def dora_of_a_norm() -> Call:
    """Without a bias: y is what is kept; and the norm is given."""
    x, weight, _, A, B = linear()
    norm = (weight + 0.7 * B @ A).detach().norm(dim=1)
    return lambda: dora_linear(x, weight, None, A, B, tensor(N, seed=1), scaling=0.7, norm=norm)


def added(p: Any) -> Call:
    x, _, _, A, B = linear()
    return lambda: lora_add(tensor(2, 3, N), x, A, B, scaling=0.7, dropout_p=p)


def stacked(p: Any) -> Call:
    made = [projection(n, K, r, kind, bias=bias) for n, r, kind, bias in STACK]
    made = leaves([made[0], with_norm(made[1]), made[2]])
    return lambda: stacked_linear(tensor(2, 3, K), made, dropout_p=p, dropout_on_base=False)


def gated(p: Any) -> Call:
    shapes = [(N, K, 4, "lora", True), (N, K, 2, "dora", True), (8, N, 3, "dora", False)]
    made = [projection(n, k, r, kind, bias=bias) for n, k, r, kind, bias in shapes]
    made = leaves([made[0], with_norm(made[1]), made[2]])
    return lambda: gated_mlp(tensor(2, 3, K), *made, dropout_p=p, dropout_on_base=False)


STACK = [(12, 2, "lora", True), (8, 3, "dora", True), (8, 1, "dora", False)]


def update(series: bool, non_linearity: Any) -> Call:
    parameters = [tensor(*shape) for shape in ((5, K), (5,), (K, 5), (K,))]
    x = None if series else tensor(2, 3, K, seed=1)
    return lambda: bottleneck(tensor(2, 3, K), x, *parameters, non_linearity=non_linearity, scaling=1.5)


def normalised() -> Call:
    parameters = [tensor(*shape) for shape in ((R, K), (R,), (R,), (N, R))]
    return lambda: ln_lora(tensor(2, 3, N), tensor(2, 3, K), *parameters, scaling=1.5)


def of_a_subspace(which: str, kind: str) -> Call:
    numels = (N * K, N, 11 * 8)
    made, tables = projection_of(kind, 9, numels)
    tables = [t.to(DEVICE, torch.float32 if t.is_floating_point() else t.dtype) for t in tables]
    W, b, table = (tensor(*s).requires_grad_(False) for s in ((N, K), (N,), (11, 8)))
    phi = coordinates(made, tensor(9).detach(), tables).requires_grad_()
    spec, bias_at, table_at = made.spec(), made.blocks(N * K), made.blocks(N * K) + made.blocks(N)
    ids = torch.tensor([[0, 10, 3], [3, 2, 2]], device=DEVICE)
    if which == "weight":
        return lambda: subspace_weight(W, phi, tables, spec, 0)
    if which == "embedding":
        return lambda: subspace_embedding(ids, table, phi, tables, spec, table_at, 2)
    return lambda: subspace_linear(tensor(2, 3, K), W, b, phi, tables, spec, [0, bias_at], transposed=False)


# What to call, whether it has kernels, and the ops that come of it, each with its backward.
CASES: dict[str, tuple[Callable[[], Call], bool, str]] = {
    "lora": (lambda: lora(0.0), True, "lora_linear"),
    "lora-dropout": (lambda: lora(0.3), True, "lora_linear"),
    "dora": (dora_of_a_norm, True, "dora_linear"),
    "dora-dropout": (lambda: dora(0.3), True, "dora_linear"),
    "dora-adapter-dropout": (lambda: dora(0.3, on_base=False), True, "dora_linear"),
    "lora_add": (lambda: added(0.0), True, "lora_add"),
    "lora_add-dropout": (lambda: added(0.3), True, "lora_add"),
    "stacked": (lambda: stacked(0.0), True, "stacked_linear"),
    "stacked-dropout": (lambda: stacked(0.3), True, "stacked_linear"),
    "gated_mlp": (lambda: gated(0.0), True, "gated_mlp"),
    "gated_mlp-dropout": (lambda: gated(0.3), True, "gated_mlp"),
    "bottleneck-series": (lambda: update(True, "tanh"), True, "bottleneck"),
    "bottleneck-parallel": (lambda: update(False, "silu"), True, "bottleneck"),
    "ln_lora": (normalised, False, "ln_lora"),
    "subspace_linear": (lambda: of_a_subspace("linear", "fastfood"), False, "subspace_linear"),
    "subspace_linear-hashed": (lambda: of_a_subspace("linear", "hashed"), False, "subspace_linear"),
    "subspace_embedding": (lambda: of_a_subspace("embedding", "fastfood"), False, "subspace_embedding"),
    "subspace_weight": (lambda: of_a_subspace("weight", "hashed"), False, "subspace_weight"),
}
LIVE = nn.Dropout(0.3)


def record(call: Call) -> dict[Any, tuple[Any, ...]]:
    """The custom ops that ``call`` and the gradients of all it returns run, with their arguments."""
    with Recorder() as recorder:
        outputs = call()
        sum(y.square().sum() for y in ([outputs] if isinstance(outputs, Tensor) else outputs)).backward()
    return recorder.calls


def check(op: Any, arguments: tuple[Any, ...]) -> None:
    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        trains = value.requires_grad and not op._opname.endswith("_backward")
        return value.detach().clone().requires_grad_(trains)

    arguments = tree_map(own, arguments)
    differentiable = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(arguments))
    assert differentiable or op._opname.endswith("_backward") or op._opname == "probabilities"
    torch.library.opcheck(op, arguments)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    with interpreter.mended(), fastpeft.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("case", "backend"),
    [(name, b) for name, (_, kernels, _) in CASES.items() for b in ("torch", *["triton"] * kernels)],
    indirect=["backend"],
)
def test_forward_and_backward(case: str, backend: str) -> None:
    make, has_kernels, name = CASES[case]
    calls = record(make())
    assert {op._opname for op in calls} == {name, f"{name}_backward"}
    for op, arguments in calls.items():
        if has_kernels:
            assert backend in arguments[-4:], "the backend under test is not the one recorded"
        check(op, arguments)


@pytest.mark.parametrize("make", [lora, dora, added, stacked, gated])
def test_with_a_probability_read_when_it_runs(make: Callable[[Any], Call]) -> None:
    with fastpeft.use_backend("torch"):
        calls = record(make(LiveProbability(LIVE)))
        assert "probabilities" in {op._opname for op in calls}
        for op, arguments in calls.items():
            check(op, arguments)


def test_no_op_is_left_out() -> None:
    every = {
        name.removeprefix("fastpeft::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastpeft::")
    }
    names = {name for _, _, name in CASES.values()}
    assert every == names | {f"{name}_backward" for name in names} | {"probabilities"}
