"""What may happen between a patch and a call, or between two calls, and must show in a block's results."""

from __future__ import annotations

import copy
import pickle
import random
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastpeft
from fastpeft.blocks.gated import find_roles
from fastpeft.blocks.install import release_blocks
from tests.block_models import HIDDEN, WIDE, blocks
from tests.tolerance import relative_error


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


class Attention(nn.Module):
    """q, k and v of one x; a test says what happens in between."""

    between = staticmethod(lambda module, x: None)

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.v = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        q = self.q(x)
        self.between(self, x)
        return q, self.k(x), self.v(x)


class WithoutGradientsForK(Attention):
    def forward(self, x):
        q = self.q(x)
        with torch.no_grad():
            k = self.k(x)
        return q, k, self.v(x)


class WithoutGradientsForQ(Attention):
    def forward(self, x):
        with torch.no_grad():
            q = self.q(x)
        return q, self.k(x), self.v(x)


class WithoutAutocastForK(Attention):
    def forward(self, x):
        q = self.q(x)
        with torch.autocast("cpu", enabled=False):
            k = self.k(x)
        return q, k, self.v(x)


class WritesX(Attention):
    def forward(self, x):
        q = self.q(x)
        x.mul_(2.0)
        k = self.k(x)
        x[:, 0] = 0.0
        return q, k, self.v(x)


class DetachesK(Attention):
    def forward(self, x):
        q = self.q(x)
        return q, self.k(x).detach(), self.v(x)


class OnlyQ(Attention):
    def forward(self, x):
        q = self.q(x)
        if self.k is not None and self.k is self.v:
            return self.k(x)
        return (q,)


def attention(kind=Attention, in_place: bool = False, **options) -> nn.Module:
    config = {"r": 2, "target_modules": ["q", "k", "v"], "init_lora_weights": False, **options}
    model = blocks(kind())
    torch.manual_seed(4)
    if not in_place:
        return fastpeft.patch(model, fastpeft.LoRA(**config))
    return fastpeft.patch(get_peft_model(model, LoraConfig(**config)))


def inner(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, Attention))


def alone(model: nn.Module) -> nn.Module:
    """A copy whose linears are computed one by one."""
    twin = copy.deepcopy(model)
    release_blocks(twin)
    return twin


def outcome(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The results, what of them can be differentiated, and the gradients."""
    x = X.clone()
    ys = model(x)
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    found |= {f"y{i} trains": torch.tensor(y.requires_grad) for i, y in enumerate(ys)}
    sum(y.float().square().sum() for y in ys if y.requires_grad).backward()
    return found | {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert (found[name] is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-4, msg=name)


both = pytest.mark.parametrize("in_place", [False, True], ids=["plain", "peft"])


@both
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "kind",
    [Attention, WithoutGradientsForK, WithoutGradientsForQ, WithoutAutocastForK, DetachesK],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_siblings_in_other_modes_are_their_own(kind, use_dora, in_place, autocast):
    model = attention(kind, in_place, use_dora=use_dora)
    assert inner(model).__dict__["_fastpeft_siblings"].runs
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        twin = alone(model)
        found = outcome(model)
        if not autocast:
            assert_same(found, outcome(twin))
            return
        expected = outcome(twin)
    for name, want in expected.items():
        assert (found[name] is None) == (want is None), name
        if want is not None:
            assert found[name].dtype is want.dtype
            assert found[name].dim() == 0 or relative_error(found[name], want) <= 2e-2, name  # bf16


@both
@pytest.mark.parametrize("options", [{"lora_dropout": 0.4}, {"use_dora": True}], ids=["dropout", "dora"])
def test_gradients_of_those_that_the_loss_reaches_alone(options, in_place):
    """Of v alone, whose columns and seeds are the last; with a bias, and x's gradient."""
    model = attention(in_place=in_place, **options).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))
    found = []
    for which in (model, alone(model)):
        torch.manual_seed(6)
        x = X.clone().requires_grad_()
        which(x)[2].square().sum().backward()
        found.append({"x": x.grad} | {name: p.grad for name, p in which.named_parameters()})
    assert_same(*found)
    assert sum(gradient is not None for gradient in found[0].values()) == (5 if "use_dora" in options else 4)


@both
def test_an_input_that_is_written_in_between_is_another(in_place):
    for kind, between in ((WritesX, None), (Attention, lambda module, x: x.mul_(2.0))):
        model = attention(kind, in_place)
        if between is not None:
            inner(model).between = between
        with torch.no_grad():
            for got, want in zip(model(X.clone()), alone(model)(X.clone()), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    model = attention(WritesX, in_place)  # inference tensors do not count writes: the source tells of these
    with torch.inference_mode():
        for got, want in zip(model(X.clone()), alone(model)(X.clone()), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def write_to_b(model: nn.Module) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "k.lora_B" in n).add_(1.0)


def exchange_b(model: nn.Module) -> None:
    held = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("k.lora_B")))
    if isinstance(held, nn.ParameterDict):
        held["default"] = nn.Parameter(held["default"] + 1.0)
    else:
        held["default"].weight = nn.Parameter(held["default"].weight + 1.0)


def write_to_base(model: nn.Module) -> None:
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "k." in n and n.endswith("bias")).add_(1.0)


def switch(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        model.set_adapter("other")
    else:
        fastpeft.set_adapter(model, "other")


def disable(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        model.base_model.disable_adapter_layers()
    else:
        for child in inner(model).children():
            child.adapters_enabled = False


@both
@pytest.mark.parametrize(
    "change",
    [write_to_b, exchange_b, write_to_base, switch, disable, nn.Module.eval],
    ids=lambda change: change.__name__,
)
def test_adapters_may_change_between_direct_calls(change, in_place):
    model = attention(in_place=in_place, lora_dropout=0.5)
    other = {"r": 2, "target_modules": ["q", "k", "v"], "init_lora_weights": False}
    if in_place:
        model.add_adapter("other", LoraConfig(**other))
    else:
        fastpeft.add_adapter(model, "other", fastpeft.LoRA(**other))
    if change is not nn.Module.eval:
        model.eval()
    module = inner(model)
    with torch.no_grad():
        module.q(X)
        change(model)
        got = module.k(X)
        want = inner(alone(model)).k(X)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@both
def test_a_y_of_which_nothing_trains_wants_no_gradient(in_place):
    model = attention(in_place=in_place)
    for name, parameter in model.named_parameters():
        if ".k." in name:
            parameter.requires_grad_(False)
    q, k, v = model(X)
    assert (q.requires_grad, k.requires_grad, v.requires_grad) == (True, False, True)
    (q + v).sum().backward()
    assert model(X.clone().requires_grad_())[1].requires_grad


def test_what_is_not_fetched_goes_with_x():
    model = attention(OnlyQ)
    siblings = inner(model)._fastpeft_siblings
    for scope in (torch.no_grad(), torch.enable_grad()):
        with scope:
            x = X.clone()
            model(x)[0].sum()
            assert siblings._ready
            reference = weakref.ref(x)
            if torch.is_grad_enabled():  # the record of k keeps x, until others are computed together
                other = attention()
                other(X.clone())
            del x
            assert reference() is None
            assert not siblings._ready


def test_threads_have_their_own_results():
    model = attention()
    inputs = [X + i for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    barrier = threading.Barrier(len(inputs))
    inner(model).between = lambda module, x: barrier.wait(timeout=20)  # all q's, then all k's
    found = {}

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = [model(inputs[i]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, want in enumerate(expected):
        for got in found[i]:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    siblings = inner(model)._fastpeft_siblings
    assert siblings.runs == (("q", "k", "v"),)
    assert not siblings._ready


@both
def test_a_sibling_may_be_taken_away(in_place):
    for take in (lambda m: setattr(m, "k", None), lambda m: delattr(m, "k")):
        model = attention(OnlyQ, in_place)
        want = alone(model)(X)[0]
        take(inner(model))
        inner(model).k = None
        torch.testing.assert_close(model(X)[0], want, rtol=1e-5, atol=1e-5)


def test_linears_take_their_input_by_keyword():
    model = fastpeft.patch(
        nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)), fastpeft.LoRA(r=2, target_modules=["0", "1"])
    )
    ids = torch.tensor([1, 2])
    assert torch.equal(model[0](input=ids), model[0](ids))
    assert torch.equal(model[1](input=model[0](ids)), model(ids))
    with pytest.raises(TypeError, match="'input'"):
        model[1]()


@both
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_jagged_inputs_are_taken_row_by_row(in_place, use_dora):
    model = attention(in_place=in_place, use_dora=use_dora)
    rows = [X[:2], X[2:]]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for name in ("q", "k"):
        linear = getattr(inner(model), name)
        y = linear(nested)
        assert torch.equal(y.offsets(), nested.offsets())
        torch.testing.assert_close(y.values(), linear(X), rtol=1e-5, atol=1e-5)
        (y + y).values().sum().backward()


def replicated(model: nn.Module, change) -> nn.Module:
    """As nn.parallel.replicate makes a replica, with every parameter changed."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, change(parameter))
    return replicas[model]


@both
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_replicas_of_data_parallel_compute_with_their_own_parameters(in_place, use_dora):
    model = nn.ModuleList([Attention(), Gated()])
    options = {"r": 2, "target_modules": ["q", "k", "gate", "up", "down"], "use_dora": use_dora}
    if in_place:
        model = fastpeft.patch(get_peft_model(model, LoraConfig(**options, init_lora_weights=False)))
        layers = model.base_model.model
    else:
        model = layers = fastpeft.patch(model, fastpeft.LoRA(**options, init_lora_weights=False))
    with torch.no_grad():
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    expected = twin.base_model.model if in_place else twin
    replica = replicated(model, lambda p: p * 1.5)
    replica = replica.base_model.model if in_place else replica
    for got, want in zip(replica[0](X), expected[0](X), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    y = replica[1](X)
    torch.testing.assert_close(y, expected[1](X), rtol=1e-4, atol=1e-4)
    y.sum().backward()  # through the replicas, into the parameters
    assert all(p.grad is not None for n, p in layers[1].named_parameters() if "lora_" in n)
    path = "base_model.model.1" if in_place else "1"
    torch.testing.assert_close(layers[1](X), alone(model).get_submodule(path)(X), rtol=1e-5, atol=1e-5)
    fastpeft.unpatch(model)
    assert not any("_replicate_for_data_parallel" in module.__dict__ for module in model.modules())
