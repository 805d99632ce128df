"""Every path of the Triton backend, pinned, through the ops: the path asked for, and the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastpeft
import fastpeft_kernels
from fastpeft import choice
from fastpeft.ops.dora import dora_linear, dora_linear_reference
from fastpeft.ops.lora import lora_linear, lora_linear_reference
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.tolerance import assert_within_rule

SCALING = 0.7
NAMES = ("x", "lora_A", "lora_B", "bias", "magnitude")


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
            way = "_vendor" if options.get("vendor_gemm") else "_tma" if options.get("tma") else ""
            names.append(name + way)
            return launcher(*arguments, **options)

        return call

    for name in fastpeft_kernels.__all__:
        if name.startswith(("lora_", "dora_", "row_norm")):
            monkeypatch.setattr(fastpeft_kernels, name, record(name), raising=False)
    return names


def problem(tokens: int, r: int, *, dora: bool, bias: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(tokens + r)
    tensors = {
        "x": torch.randn(tokens, 40, generator=g),
        "weight": torch.randn(72, 40, generator=g) / 40**0.5,
        "lora_A": torch.randn(r, 40, generator=g) / 40**0.5,
        "lora_B": torch.randn(72, r, generator=g) / r**0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(72, generator=g)
    if dora:
        tensors["magnitude"] = 1 + torch.rand(72, generator=g)
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def run(t: dict[str, Tensor], dtype: torch.dtype, *, reference: bool) -> list[Tensor]:
    t = {name: tensor.to(dtype).requires_grad_(name in NAMES) for name, tensor in t.items()}
    arguments = [t["x"], t["weight"], t.get("bias"), t["lora_A"], t["lora_B"]]
    if "magnitude" in t:
        function = dora_linear_reference if reference else dora_linear
        y = function(*arguments, t["magnitude"], scaling=SCALING)
    else:
        function = lora_linear_reference if reference else lora_linear
        y = function(*arguments, scaling=SCALING)
    trained = [t[name] for name in NAMES if name in t]
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(DEVICE, torch.bfloat16).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, trained, dy)]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("pin", "r", "expected"),
    [
        ("split", 5, ""),
        ("aten", 5, "_expand"),
        ("single", 5, "_single"),
        ("single", 70, ""),
        ("tma", 5, "_tma"),
    ],
    ids=["split", "aten", "single", "single-beyond-its-rank", "tma"],
)
def test_pinned_path(pin, r, expected, dora, calls, monkeypatch):
    monkeypatch.setattr(choice, "CHOOSER", choice.Chooser(pin))
    t = {name: tensor.to(torch.bfloat16) for name, tensor in problem(70, r, dora=dora, bias=False).items()}
    results = run(t, torch.bfloat16, reference=False)
    exact, plain = run(t, torch.float64, reference=True), run(t, torch.bfloat16, reference=True)
    for i, (result, e, p) in enumerate(zip(results, exact, plain, strict=True)):
        assert_within_rule(result, e, p, f"result {i}")
    kind = "dora" if dora else "lora"
    assert f"{kind}_forward{expected}" in calls, calls
    if not dora:
        assert calls[-1] == "lora_backward" + {"aten": "_vendor", "tma": "_tma"}.get(pin, "")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_few_tokens_without_gradients_are_decoded(tokens, dora, calls):
    t = problem(tokens, 5, dora=dora)
    kind = "dora" if dora else "lora"
    extra = [t["magnitude"]] if dora else []
    arguments = [t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], *extra]
    y = (dora_linear if dora else lora_linear)(*arguments, scaling=SCALING)
    assert (f"{kind}_decode" in calls) == (tokens <= 16), calls
    exact = run(t, torch.float64, reference=True)[0]
    assert_within_rule(y, exact, run(t, torch.float32, reference=True)[0], "y")
    calls.clear()
    t["lora_B"].requires_grad_()
    (dora_linear if dora else lora_linear)(*arguments, scaling=SCALING)
    assert f"{kind}_decode" not in calls, "backward needs S, which decoding does not keep"
