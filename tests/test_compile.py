"""What compiles once and stays compiled: dropout's p may change, adapters may be switched, modes too."""

from __future__ import annotations

import copy
import pickle
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

import fastpeft
from fastpeft.ops.dropout import dropout_mask
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.probability import LiveProbability, as_inputs, follow, probability_of
from tests.block_models import HIDDEN, Attention, Mlp, blocks
from tests.in_place.cases import with_adapters
from tests.tolerance import relative_error


class OrderedMlp(Mlp):
    """As its source is read, gate comes before up in every call: the same draws each time."""

    def forward(self, x):
        return self.back(F.silu(self.one(x)) * self.two(x))


METHODS = [
    {},
    {"use_dora": True},
    pytest.param({"use_dora": True, "dora_dropout": "adapter"}, id="dora-adapter"),
]


def adapted(in_place: bool, *adapters: dict[str, object]) -> nn.Module:
    """A model with a stacked block, a single linear and a gated MLP; one adapter per set of options."""
    model = blocks(Attention(), OrderedMlp())
    everything = {"r": 2, "target_modules": ".*(to_q|to_k|to_v|out|one|two|back)"}
    if in_place:
        return fastpeft.patch(
            with_adapters(model, [{**everything, **options} for options in adapters])
        ).train()
    torch.manual_seed(0)
    configs = [fastpeft.LoRA(init_lora_weights=False, **everything, **options) for options in adapters]
    fastpeft.patch(model, configs[0])
    for config in configs[1:]:
        fastpeft.add_adapter(model, "other", config)
    return model.train()


def model_with_dropout(in_place: bool, p: float = 0.1, **options: object) -> nn.Module:
    return adapted(in_place, {"lora_dropout": p, **options})


def dropouts(model: nn.Module) -> Iterator[nn.Dropout]:
    return (module for module in model.modules() if isinstance(module, nn.Dropout))


def set_p(model: nn.Module, p: float) -> None:
    found = list(dropouts(model))
    assert found
    for dropout in found:
        dropout.p = p


def step(model: nn.Module) -> dict[str, torch.Tensor]:
    """The loss and the gradients for one seed."""
    model.zero_grad()
    torch.manual_seed(3)
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    loss = model(x).square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """By norm: the same draws in the same order give the same masks, and sums in another order rounding."""
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        assert relative_error(found[name], want) <= 1e-5, name


class Counted:
    """A compiled model, and how many graphs it has taken so far."""

    def __init__(self, model: nn.Module, backend: str = "aot_eager") -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.model = model
        self.compiled = torch.compile(model, fullgraph=True, backend=backend)

    def step(self) -> dict[str, torch.Tensor]:
        found = step(self.compiled)
        return {name.removeprefix("_orig_mod."): value for name, value in found.items()}

    @property
    def graphs(self) -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_another_p_needs_no_other_graph_and_is_taken(in_place, options):
    if in_place and "dora_dropout" in options:
        pytest.skip("PEFT has one meaning of DoRA's dropout")
    model = model_with_dropout(in_place, **options)
    counted = Counted(model)
    for p in (0.1, 0.2, 0.05, 0.0, 0.7):
        set_p(model, p)
        assert_same(counted.step(), step(model))
    assert counted.graphs == 1


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "peft"])
def test_train_and_eval_are_two_graphs(in_place):
    model = model_with_dropout(in_place)
    counted = Counted(model)
    for p in (0.1, 0.3):
        set_p(model, p)
        for training in (True, False):
            model.train(training)
            assert_same(counted.step(), step(model))
    assert counted.graphs == 2


def test_projections_of_one_block_may_differ_in_p():
    model = model_with_dropout(False)
    counted = Counted(model)
    for start in (0.05, 0.3):
        for i, dropout in enumerate(dropouts(model)):
            dropout.p = start + i % 5 / 10
        assert_same(counted.step(), step(model))
    assert counted.graphs == 1


def test_one_graph_serves_every_layer_whatever_its_p():
    """Layers of a stack are compiled one by one, as in regional compilation, each with its own dropout."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stack = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    fastpeft.patch(stack, fastpeft.LoRA(r=2, lora_dropout=0.1, target_modules=".*")).train()
    for i, layer in enumerate(stack):
        layer.lora_dropout["default"].p = i / 10
        layer.compile(fullgraph=True, backend="aot_eager")
        layer(torch.ones(3, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


both = pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])


@both
def test_an_adapter_of_pefts_is_compiled_once(options):
    model = adapted(True, options, options)
    model.base_model.set_adapter("default")
    counted = Counted(model)
    losses = []
    for turn, name in enumerate(("default", "other", "default", "other")):
        model.base_model.set_adapter(name)
        found, expected = counted.step(), step(model)
        assert_same(found, expected)
        losses.append(found["loss"])
        assert counted.graphs == min(turn + 1, 2)
    assert losses[0] == losses[2] != losses[1] == losses[3]


def switched_there_and_back(model: nn.Module, backend: str) -> None:
    """One graph for both adapters, whose losses and gradients are those of eager mode."""
    counted = Counted(model, backend)
    losses = []
    for name in ("default", "other", "default", "other"):
        fastpeft.set_adapter(model, name)
        found, expected = counted.step(), step(model)
        assert_same(found, expected)
        assert {key.rpartition(".")[2] for key in found.keys() - {"loss"}} == {name}
        losses.append(found["loss"])
        assert counted.graphs == 1
    assert losses[0] == losses[2] != losses[1] == losses[3]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize(
    ("others", "backend"),
    [({}, "aot_eager"), ({"lora_alpha": 5}, "eager"), ({"lora_alpha": 5, "lora_dropout": 0.4}, "aot_eager")],
    ids=["alike", "scaling", "scaling-and-dropout"],
)
def test_a_switch_between_adapters_reuses_the_graph(options, others, backend):
    first = {"lora_alpha": 2, "lora_dropout": 0.1 if "lora_dropout" in others else 0.0, **options}
    switched_there_and_back(adapted(False, first, {**first, **others}), backend)


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()),
    reason="inductor needs g++ and Python.h",
)


@needs_compiler
@both
def test_the_default_backend_computes_the_same_and_is_not_asked_again(options):
    first = {"lora_alpha": 2, **options}
    switched_there_and_back(adapted(False, first, {**first, "lora_alpha": 5}), "inductor")


@both
def test_a_switch_reuses_the_graph_of_an_embedding(options):
    model = nn.Sequential(nn.Embedding(9, 6))
    config = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, **options}
    fastpeft.patch(model, fastpeft.LoRA(**config))
    fastpeft.add_adapter(model, "other", fastpeft.LoRA(**config, lora_alpha=3))
    counted = Counted(model)
    ids = torch.tensor([[1, 2, 8], [0, 0, 3]])
    seen = []
    for name in ("default", "other", "default"):
        fastpeft.set_adapter(model, name)
        seen.append(counted.compiled(ids))
        assert relative_error(seen[-1], model(ids).detach()) <= 1e-6
    assert counted.graphs == 1
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@both
def test_gradient_accumulation_needs_no_other_graph(options):
    model = adapted(False, options)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(4, 3, HIDDEN)
    compiled(x).sum().backward()
    optimizer.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for accumulated in (1, 3, 2):
            for part in range(accumulated):
                (compiled(x + part).square().mean() / accumulated).backward()
            found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            optimizer.zero_grad()
            sum(model(x + part).square().mean() / accumulated for part in range(accumulated)).backward()
            for p, got in zip((p for p in model.parameters() if p.requires_grad), found, strict=True):
                assert relative_error(got, p.grad) <= 1e-5
            optimizer.step()
            optimizer.zero_grad(set_to_none=accumulated == 1)


@both
def test_compiled_code_sees_parameters_that_were_exchanged(options):
    """As FSDP2, load_state_dict(assign=True), .to() and a new dropout exchange them."""
    model = adapted(False, {"lora_dropout": 0.3, **options})
    layer = model[0].to_q
    counted = Counted(model)
    seen = [counted.step()["loss"]]

    def assign() -> None:
        state = {name: 1.5 * value for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)

    def exchange() -> None:  # taken out and put in, in two steps
        parameter = layer.lora_B._parameters.pop("default")
        layer.lora_B._parameters["default"] = nn.Parameter(parameter.detach() * 3.0)

    def other_dropout() -> None:
        dropout = nn.Dropout(0.8)
        follow(dropout)
        layer.lora_dropout["default"] = dropout

    for act in (assign, exchange, other_dropout, lambda: model.double().float()):
        act()
        for parameter in model.parameters():
            parameter.grad = None
        found = counted.step()
        assert_same(found, step(model))
        seen.append(found["loss"])
    assert seen[0] != seen[1] != seen[2] != seen[3]
    assert counted.graphs == 1


@both
def test_copies_switch_among_their_own_adapters(options):
    model = adapted(False, options, options)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        switched = Counted(twin)
        for name in ("default", "other"):
            fastpeft.set_adapter(twin, name)
            fastpeft.set_adapter(model, name)
            assert_same(switched.step(), step(twin))
            assert not torch.equal(switched.step()["loss"], step(model)["loss"])
        assert switched.graphs == 1


def test_functional_call_inside_compiled_code():
    model = adapted(False, {}, {})
    torch._dynamo.reset()
    x = torch.randn(3, HIDDEN)
    exchanged = {n: 2.0 * p.detach() for n, p in model.named_parameters() if n.endswith("lora_B.default")}

    def call(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    want = call(exchanged, x)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(exchanged, x)
    assert relative_error(got, want.detach()) <= 1e-6
    assert relative_error(model(x), want.detach()) > 1e-2


def test_a_copy_follows_its_own_dropout():
    model = model_with_dropout(True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_p(model, 0.1)
        counted = Counted(twin)
        for p in (0.6, 0.2):
            set_p(twin, p)
            assert_same(counted.step(), step(twin))
        assert counted.graphs == 1


def test_an_adapter_added_later_and_one_whose_dropout_was_replaced():
    model = model_with_dropout(True)
    model.add_adapter("late", LoraConfig(r=4, lora_dropout=0.2, target_modules=["to_q", "back"]))
    model.set_adapter("late")
    counted = Counted(model)
    for p in (0.2, 0.4, 0.1):
        set_p(model, p)
        assert_same(counted.step(), step(model))
    assert counted.graphs == 1
    # Nobody was told of this one, so its p is a constant of the code; the numbers are right all the same.
    layer = model.base_model.model[1].back
    layer.lora_dropout["late"] = nn.Dropout(0.5)
    assert_same(counted.step(), step(model))


def test_unpatching_leaves_nothing_on_pefts_dropouts():
    model = with_adapters(blocks(Mlp()), [{"lora_dropout": 0.1, "target_modules": ["one"]}])
    before = [dict(dropout.__dict__) for dropout in dropouts(model)]
    fastpeft.patch(model)
    fastpeft.unpatch(model)
    assert [dropout.__dict__.keys() for dropout in dropouts(model)] == [d.keys() for d in before]


def test_a_p_that_cannot_be_is_refused_by_name():
    model = model_with_dropout(False)
    counted = Counted(model)
    counted.step()
    set_p(model, 1.5)
    with pytest.raises(fastpeft.ConfigError, match=r"expected .* 0 .* got p=1\.5"):
        counted.step()
    with pytest.raises(fastpeft.ConfigError, match=r"lora_dropout of 'default'.*p=1\.5"):
        step(model)


def test_the_op_drops_by_the_p_it_is_given_at_run_time():
    """By hand: forward's and backward's mask are those of the seed and of the module's p."""
    x = torch.randn(6, 8)
    weight, A, B = torch.randn(4, 8), torch.randn(2, 8), torch.randn(4, 2, requires_grad=True)
    dropout = nn.Dropout(0.25)
    follow(dropout)
    p = LiveProbability(dropout)
    seed = torch.tensor([11])
    for value in (0.25, 0.75):
        dropout.p = value
        ps, live = as_inputs([p])
        y, _ = torch.ops.fastpeft.lora_linear(x, weight, None, A, B, 2.0, ps, live, seed, "torch")
        mask = dropout_mask(x, value, seed)
        expected = x @ weight.T + 2.0 * ((x * mask) @ A.T) @ B.T
        torch.testing.assert_close(y, expected)
        dropout.p = 0.5  # backward is of the forward that was, not of what p is now
        (got,) = torch.autograd.grad(y.sum(), B)
        (want,) = torch.autograd.grad(expected.sum(), B)
        torch.testing.assert_close(got, want)


def test_a_weight_that_trains_and_a_second_dora_drop_by_it_too():
    """Plain autograd's way and DoRA over DoRA have dropout of their own, with torch's own masks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dropout = nn.Dropout(0.5)
    follow(dropout)
    x = torch.ones(200, 50)
    eye, A, B = torch.eye(50, requires_grad=True), torch.eye(50), torch.eye(50)

    def call(x):
        return lora_linear(x, eye, None, A, B, scaling=1.0, dropout_p=probability_of(dropout)) - x

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for p in (0.5, 0.2, 0.9):
        dropout.p = p
        y = compiled(x)
        kept = y != 0.0
        torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1.0 / (1.0 - p)))
        assert abs(kept.float().mean().item() - (1.0 - p)) < 5 * (p * (1.0 - p) / x.numel()) ** 0.5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
