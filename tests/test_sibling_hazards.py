"""What may happen between the calls of linears that are computed together, and must show in their results;
other forms of call, and replicas.
"""

from __future__ import annotations

import copy
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastpeft
from fastpeft.blocks.install import release_blocks
from tests.block_models import HIDDEN, blocks
from tests.test_gated_hazards import Gated, X
from tests.tolerance import relative_error


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
