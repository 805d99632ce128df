"""Every path of the block ops on the Triton backend: the one pinned, the one measured, the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastpeft
import fastpeft_kernels
from fastpeft import choice
from fastpeft.ops import packed
from fastpeft.ops.gated_mlp import gated_mlp, gated_mlp_reference
from fastpeft.ops.stacked import stacked_linear, stacked_linear_reference
from fastpeft_kernels.projection import Projection
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.models import llama
from tests.ops.blocks import dropout_masks, leaves, projection, trained
from tests.tolerance import assert_within_rule

BF16 = torch.bfloat16
STACKS = {
    "lora": [(40, 5, "lora", True), (20, 16, "lora", False), (20, 0, "base", True)],
    "dora": [(40, 5, "dora", False), (20, 3, "lora", True), (20, 16, "dora", True)],
}
GATED = {
    "lora": [(40, 5, "lora", False), (40, 0, "base", True), (30, 16, "lora", True)],
    "dora": [(40, 5, "dora", True), (40, 3, "dora", False), (30, 5, "dora", True)],
}
FEATURES = 30


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with interpreter.mended(), fastpeft.use_backend("triton"):
        yield


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the kernel package's launchers, as they are called."""
    names: list[str] = []

    def record(name: str):
        launcher = getattr(fastpeft_kernels, name)

        def call(*arguments, **options):
            names.append(name + ("_vendor" if options.get("vendor_gemm") else ""))
            return launcher(*arguments, **options)

        return call

    for name in fastpeft_kernels.__all__:
        if name.startswith(("lora_", "dora_", "stacked_", "glu_")):
            monkeypatch.setattr(fastpeft_kernels, name, record(name), raising=False)
    return names


def stack(kind: str, dtype: torch.dtype = BF16) -> list[Projection]:
    return [projection(n, FEATURES, r, k, bias=b, dtype=dtype) for n, r, k, b in STACKS[kind]]


def mlp(kind: str, dtype: torch.dtype = BF16) -> list[Projection]:
    (n, *_), *_ = GATED[kind]
    insides = (FEATURES, FEATURES, n)
    return [
        projection(n, inside, r, k, bias=b, dtype=dtype)
        for (n, r, k, b), inside in zip(GATED[kind], insides, strict=True)
    ]


def tokens(count: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(count)).to(DEVICE, dtype)


def run(function, x: Tensor, projections: list[Projection], dtype=None, **options) -> list[Tensor]:
    """Return the outputs and the gradients of x and of every parameter for fixed output gradients."""
    x = (x if dtype is None else x.to(dtype)).detach().clone().requires_grad_()
    projections = leaves(projections, dtype)
    if "masks" in options:
        options["masks"] = [m.to(x.dtype) for m in options["masks"]]
    ys = function(x, projections, **options)
    g = torch.Generator().manual_seed(5)
    dys = [torch.randn(y.shape, generator=g).to(DEVICE, BF16).to(y.dtype) for y in ys]
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *trained(projections)], dys)]


def fused(x, projections, **options):
    return (gated_mlp(x, *projections, **options),)


def plain(x, projections, **options):
    return (gated_mlp_reference(x, *projections, **options),)


def assert_same(results, function, x, projections, **options) -> None:
    exact = run(function, x, projections, torch.float64, **options)
    baseline = run(function, x, projections, x.dtype, **options)
    for i, (result, e, b) in enumerate(zip(results, exact, baseline, strict=True)):
        assert_within_rule(result, e, b, f"result {i}")


class Clock:
    """A timer for which one path always wins, and which runs every candidate, as the real one does."""

    def __init__(self, winner: str) -> None:
        self.winner = winner

    def __call__(self, candidates, device) -> dict[str, float]:
        for candidate in candidates.values():
            candidate()
        return {name: 1.0 if name == self.winner else 2.0 for name in candidates}


@pytest.fixture
def fake_gpu(monkeypatch) -> None:
    monkeypatch.setattr(choice, "can_measure", lambda device: True)
    monkeypatch.setattr(choice, "device_name", lambda device: "Fake")


# What each path calls for the LoRA block, forward and backward.
STACKED_CALLS = {
    "split": ["stacked_forward", "stacked_backward"],
    "aten": ["stacked_forward_vendor", "stacked_backward_vendor"],
    # So small a layer is the single kernel's, by its model.
    "layers": ["lora_forward_single", "lora_forward_single", "lora_backward", "lora_backward"],
}
GATED_CALLS = {
    "split": ["glu_forward", "lora_forward", "glu_backward", "stacked_backward"],  # down pinned as well
    "aten": ["stacked_forward_vendor", "lora_forward_expand", *["stacked_backward_vendor"] * 2],
    "layers": ["lora_forward_single", "lora_forward_single", "lora_backward", "lora_backward"],
}


@pytest.mark.parametrize("pin", STACKED_CALLS)
@pytest.mark.parametrize("kind", STACKS)
def test_pinned_stack(pin, kind, calls, monkeypatch):
    monkeypatch.setattr(choice, "CHOOSER", choice.Chooser(pin))
    x, projections = tokens(20), stack(kind)
    results = run(stacked_linear, x, projections)
    assert_same(results, stacked_linear_reference, x, projections)
    if kind == "lora":
        assert calls == STACKED_CALLS[pin]
    else:  # the vendor's GEMM would need c * dY written
        assert "stacked_backward_vendor" not in calls
        assert ("dora_backward" in calls) == (pin == "layers")


@pytest.mark.parametrize("pin", GATED_CALLS)
@pytest.mark.parametrize("kind", GATED)
def test_pinned_gated_mlp(pin, kind, calls, monkeypatch):
    monkeypatch.setattr(choice, "CHOOSER", choice.Chooser(pin))
    x, projections = tokens(20), mlp(kind)
    results = run(fused, x, projections, activation="gelu_tanh")
    assert_same(results, plain, x, projections, activation="gelu_tanh")
    if kind == "lora":
        assert calls == GATED_CALLS[pin]
    else:
        assert ("glu_backward" in calls) == (pin != "layers")


@pytest.mark.parametrize("pin", ["aten", "layers"])
def test_every_path_draws_the_same_masks(pin, monkeypatch):
    """Forward by one path and backward by another have to agree on what was dropped."""
    x, projections = tokens(20, torch.float32), stack("lora", torch.float32)
    masks = dropout_masks([x.shape] * 3, [0.3] * 3, 11, torch.float32, "triton")
    for forward, backward in ((pin, "split"), ("split", pin)):
        modes = {"stacked_forward": forward, "stacked_backward": backward}
        monkeypatch.setattr(
            "fastpeft.ops.block_kernels.choose",
            lambda op, candidates, modes=modes, **_: modes[op.partition(" ")[0]],
        )
        torch.manual_seed(11)
        results = run(stacked_linear, x, projections, dropout_p=0.3)
        assert_same(results, stacked_linear_reference, x, projections, masks=masks)


@pytest.mark.parametrize("winner", ["aten", "layers"])
def test_the_fastest_path_of_a_stack_runs(winner, calls, fake_gpu, monkeypatch):
    """Measured at the first step with candidates that change nothing, taken from the second one on."""
    monkeypatch.setattr(choice, "CHOOSER", choice.Chooser("auto", Clock(winner)))
    x, projections = tokens(20), stack("lora")
    first = run(stacked_linear, x, projections)
    calls.clear()
    second = run(stacked_linear, x, projections)
    assert calls == STACKED_CALLS[winner]
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("winner", ["split", "aten"])
def test_the_fastest_path_of_a_gated_mlp_runs(winner, calls, fake_gpu, monkeypatch):
    monkeypatch.setattr(choice, "CHOOSER", choice.Chooser("auto", Clock(winner)))
    x, projections = tokens(20), mlp("lora")
    first = run(fused, x, projections)
    calls.clear()
    second = run(fused, x, projections)
    assert all(map(torch.equal, first, second))
    assert ("glu_forward" in calls) == ("glu_backward" in calls) == (winner == "split")
    assert calls.count("stacked_forward_vendor") == (winner == "aten")
    assert calls.count("stacked_backward_vendor") == (2 if winner == "aten" else 0)


def test_report_shows_the_choices_of_blocks(fake_gpu, monkeypatch):
    monkeypatch.setattr(choice, "CHOOSER", choice.Chooser("auto", Clock("aten")))
    run(stacked_linear, tokens(20), stack("lora"))
    run(stacked_linear, tokens(20), stack("dora"))
    run(fused, tokens(20), mlp("lora"))
    text = str(fastpeft.report(fastpeft.patch(llama(), fastpeft.LoRA(r=2))))
    key = "M<=32 N=80 K=30 r<=16 bf16"
    for line in (
        f"stacked_forward 40+20+20 {key}: aten (1.00), split 2.00, layers 2.00",
        f"stacked_backward 40+20+20 {key}: aten (1.00), split 2.00, layers 2.00",
        f"stacked_forward_dora 40+20+20 {key}: aten (1.00), split 2.00, layers 2.00",
        f"stacked_backward_dora 40+20+20 {key}: split (1.00), layers 1.00",
        f"glu_forward 40+40 {key}: aten (1.00), split 2.00, layers 2.00",
        "glu_backward 30 M<=32 N=30 K=40 r<=16 bf16: aten (1.00), split 2.00, layers 2.00",
    ):
        assert f"\nkernels: {line}\n" in text, text


# --- a few tokens


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("count", [1, 16, 17])
def test_a_few_tokens_of_a_stack_are_decoded(count, kind, calls):
    """One launch a linear, against the base's one and two for an adapter linear by linear."""
    x, projections = tokens(count, torch.float32), stack(kind, torch.float32)
    with torch.no_grad():
        ys = stacked_linear(x, projections)
        exact = stacked_linear_reference(x.double(), leaves(projections, torch.float64))
        baseline = stacked_linear_reference(x, projections)
    for i, (y, e, b) in enumerate(zip(ys, exact, baseline, strict=True)):
        assert_within_rule(y, e, b, f"y of {i}")
    adapted = [f"{p}_decode" for _, _, p, _ in STACKS[kind] if p != "base"]
    assert calls == (adapted if count <= 16 else ["stacked_forward"])


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("count", [1, 16, 17])
def test_a_few_tokens_of_a_gated_mlp_are_decoded(count, kind, calls):
    x, projections = tokens(count, torch.float32), mlp(kind, torch.float32)
    with torch.no_grad():
        y = gated_mlp(x, *projections)
        exact = gated_mlp_reference(x.double(), *leaves(projections, torch.float64))
        baseline = gated_mlp_reference(x, *projections)
    assert_within_rule(y, exact, baseline, "y")
    adapted = [f"{p}_decode" for _, _, p, _ in GATED[kind] if p != "base"]
    assert calls == adapted if count <= 16 else calls[0] == "glu_forward"


def test_decoding_is_for_nobody_who_differentiates(calls):
    x, projections = tokens(3), stack("lora")
    assert projections[1].lora_B is not None
    projections[1].lora_B.requires_grad_()
    stacked_linear(x, projections)
    gated = mlp("lora")
    gated_mlp(x.requires_grad_(), *gated)
    assert not [name for name in calls if "decode" in name]
    assert packed.needed(x, *packed.pack(projections)[:2]).count(True) == 2


def test_decoding_leaves_ranks_above_its_own_to_the_kernels(calls):
    projections = [projection(20, FEATURES, r, "lora", dtype=BF16) for r in (5, 70)]
    with torch.no_grad():
        stacked_linear(tokens(3), projections)
    assert calls == ["stacked_forward"]


def test_decoding_is_measured_too(calls, fake_gpu, monkeypatch):
    monkeypatch.setattr(choice, "CHOOSER", choice.Chooser("auto", Clock("split")))
    x, projections, gated = tokens(3), stack("lora"), mlp("lora")
    for _ in range(2):
        calls.clear()
        with torch.no_grad():
            stacked_linear(x, projections)
            gated_mlp(x, *gated)
    assert calls == ["stacked_forward", "glu_forward", "lora_forward"]
    assert [line.partition(":")[0] for line in choice.choices() if "decode" in line] == [
        "glu_decode 40+40+30 M<=4 N=110 K=30 r<=16 bf16",
        "stacked_decode 40+20+20 M<=4 N=80 K=30 r<=16 bf16",
    ]
