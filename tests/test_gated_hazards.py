"""What may happen between a patch and a call of a gated MLP, and must show in its result."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft.blocks.gated import find_roles
from tests.block_models import HIDDEN, WIDE, blocks


class Gated(nn.Module):
    """A gated MLP whose class says what becomes of h and of y."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, WIDE, bias=False), nn.Linear(HIDDEN, WIDE, bias=False)
        self.down = nn.Linear(WIDE, HIDDEN, bias=False)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(0.0)

    def forward(self, hidden):
        h = self.inner(self.act(self.gate(hidden)) * self.up(hidden))
        return self.down(self.drop(h)) * self.scale

    def inner(self, h):
        return h


class FunctionalDropout(Gated):
    def inner(self, h):
        return F.dropout(h, 0.1, training=self.training)


class OnlyInTraining(Gated):
    def inner(self, h):
        return h + 1.0 if self.training else h


class OnlyWithGradients(Gated):
    def inner(self, h):
        return h * 3.0 if torch.is_grad_enabled() else h


class Alpha(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.AlphaDropout(0.5)


class SkipsAtRandom(Gated):
    def inner(self, h):
        return h * 0.0 if self.training and random.random() < 0.5 else h


class OverwritesInput(Gated):
    def forward(self, hidden):
        y = Gated.forward(self, hidden)  # super() needs more than a stand-in
        hidden.mul_(2.0)
        return y


class Counts(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def inner(self, h):
        self.calls.add_(1)
        return h


class Logs(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.log = []

    def inner(self, h):
        self.log.append(h.shape)
        return h


class Remembers(Gated):
    last = None

    def inner(self, h):
        self.last = h.shape
        return h


class Configured(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {})()
        self.config.factor = 1.0

    def inner(self, h):
        return h if self.config.factor == 1.0 else h * self.config.factor


def patched(kind, training: bool = False) -> nn.Module:
    model = blocks(kind()).train(training)
    return fastpeft.patch(model, fastpeft.LoRA(r=2, target_modules=".*", init_lora_weights=False))


def is_fused(model: nn.Module) -> bool:
    return any("are one op (silu)" in line for line in fastpeft.report(model).blocks)


X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))


def assert_own(model: nn.Module) -> None:
    """The module computes what its class's forward does."""
    own = type(model[0]).forward(model[0], X)
    torch.testing.assert_close(model(X), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["patched in eval", "patched in training"])
@pytest.mark.parametrize(
    "kind",
    [FunctionalDropout, OnlyInTraining, OnlyWithGradients, Alpha, SkipsAtRandom, Counts, Logs, Remembers],
    ids=lambda kind: kind.__name__,
)
def test_a_forward_that_is_more_than_the_formula_is_left_alone(kind, training):
    model = patched(kind, training)
    assert not is_fused(model)
    assert getattr(model[0], "calls", torch.zeros(())).item() == 0
    assert getattr(model[0], "log", []) == []
    assert "last" not in model[0].__dict__
    model.train()
    states = torch.get_rng_state(), random.getstate()
    y = model(X)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    assert torch.equal(y, type(model[0]).forward(model[0], X))


def test_the_search_leaves_random_numbers_and_modes_as_they_were():
    model = blocks(Gated(), OverwritesInput())
    model[0].act.eval()
    states, torch_state = random.getstate(), torch.get_rng_state()
    fastpeft.patch(model, fastpeft.LoRA(r=2, target_modules=["gate"], init_lora_weights="orthogonal"))
    model_again = blocks(Gated(), OverwritesInput())
    torch.set_rng_state(torch_state)
    linears = {"gate": (HIDDEN, WIDE), "up": (HIDDEN, WIDE), "down": (WIDE, HIDDEN)}
    assert not isinstance(find_roles(model_again[0], linears), str)
    assert isinstance(find_roles(model_again[1], linears), str)
    assert random.getstate() == states
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert not model[0].act.training


def hooked(module: nn.Module) -> None:
    module.act.register_forward_hook(lambda m, given, y: 0.5 * y)


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        lambda m: setattr(m, "act", nn.ReLU()),
        lambda m: setattr(m, "scale", 3.0),
        lambda m: setattr(m, "inner", lambda h: -h),
        lambda m: setattr(m.act, "forward", lambda h: -h),
        lambda m: setattr(m.drop, "p", 0.5),
        lambda m: setattr(m, "drop", nn.Tanh()),
        lambda m: setattr(m, "down", nn.Tanh()),
    ],
    ids=["hook", "activation", "scale", "method", "activation's forward", "p", "dropout", "down"],
)
def test_what_the_forward_reads_may_change_after_the_patch(change):
    for model in (patched(Gated, True), pickle.loads(pickle.dumps(patched(Gated, True)))):
        for twin in (copy.deepcopy(model), model):
            assert is_fused(twin)
            change(twin[0])
            torch.manual_seed(3)
            found = twin(X)
            torch.manual_seed(3)
            assert torch.equal(found, type(twin[0]).forward(twin[0], X))


def test_a_configuration_s_values_may_change():
    model = patched(Configured)
    assert is_fused(model)
    assert_own(model)
    model[0].config.factor = 2.0
    assert_own(model)


def test_backward_hooks_on_the_activation_are_called():
    model = patched(Gated)
    twin = copy.deepcopy(model)
    seen = []
    model[0].act.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].shape))
    model(X).sum().backward()
    assert seen == [(5, WIDE)]
    twin(X).sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)


def test_a_class_s_forward_may_be_replaced(monkeypatch):
    model = patched(Gated)
    assert_own(model)
    monkeypatch.setattr(Gated, "forward", lambda self, x: x * 0.0)
    assert not model(X).any()


def test_any_form_of_call_is_taken():
    model = patched(Gated)
    want = model[0](X)
    torch.testing.assert_close(model[0](hidden=X), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="hidden"):
        model[0]()
