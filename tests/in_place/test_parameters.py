"""PEFT's LoRA on Parameters (``target_parameters``): stacked experts, by every way of multiplying them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpeft
from fastpeft.in_place.install import tuner_layers
from fastpeft.layers.factored import FactoredWeight
from fastpeft.ops import eager
from tests.in_place.own_product import OwnProduct
from tests.tolerance import relative_error

pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    "mixtral": (t.MixtralForCausalLM, t.MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (
        t.Qwen3MoeForCausalLM,
        t.Qwen3MoeConfig,
        {"moe_intermediate_size": 16, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    # Weights [experts, in_features, out_features], with biases.
    "gpt-oss": (t.GptOssForCausalLM, t.GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
    # Experts by one batched product.
    "llama4": (
        t.Llama4ForCausalLM,
        t.Llama4TextConfig,
        {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48},
    ),
}
WAYS = ["eager", "grouped_mm", "batched_mm"]
IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))


def plain(name: str, way: str = "eager") -> nn.Module:
    make, config, options = MODELS[name]
    torch.manual_seed(0)
    model = make(config(**SIZES, **options, attn_implementation="eager")).eval()
    if name != "llama4":
        model.set_experts_implementation(way)
    return model


def adapted(model: nn.Module, *, r: int = 3, **options) -> nn.Module:
    options = {"target_modules": [], "target_parameters": EXPERTS, **options}
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=r, init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    return model


def outcome(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_same(model: nn.Module, untouched: nn.Module) -> None:
    found, expected = outcome(model), outcome(untouched)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6, msg=key)


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """An accelerated model, and the same one untouched."""
    return fastpeft.patch(copy.deepcopy(model)), model


CASES = [(name, way) for name in MODELS for way in WAYS if name != "llama4" or way == "eager"]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_like_peft_and_no_sum_is_formed(name, way):
    ours, theirs = both(adapted(plain(name, way)))
    assert_same(ours, theirs)
    report = fastpeft.report(ours)
    assert report.calls == {"fused": 4}  # two Parameters in two layers
    assert not report.reasons
    assert [m.action for m in report.modules] == ["accelerated"] * 4
    assert {m.detail.split(" ")[0].rpartition(".")[2] for m in report.modules} == {
        "gate_up_proj",
        "down_proj",
    }


class Made(TorchDispatchMode):
    """The shapes of the floats that operations make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in tree_leaves(args) if isinstance(a, torch.Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(made.shape))
        return result


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_nothing_of_the_size_of_the_stack_or_of_an_expert_is_made(way):
    ours, theirs = both(adapted(plain("mixtral", way)))
    large = {(4, 96, 32), (4, 32, 48), (96, 32), (32, 48)}
    large |= {tuple(reversed(shape[-2:])) for shape in large} | {(4, 32, 96), (4, 48, 32)}
    found = []
    for model in (ours, theirs):
        with eager.seen_through(), Made() as made:  # into our custom ops
            outcome(model)
        found.append(made.shapes & large)
    assert not found[0]
    assert found[1], "PEFT forms it: the spy does not see what it should"


@pytest.mark.parametrize("way", WAYS)
def test_sixteen_bits_are_at_least_as_exact_as_pefts(way):
    exact = outcome(adapted(plain("mixtral")).double())  # a grouped product takes no fp64
    ours, theirs = both(adapted(plain("mixtral", way)).bfloat16())
    found, baseline = outcome(ours), outcome(theirs)
    for name in exact:
        error, limit = relative_error(found[name], exact[name]), relative_error(baseline[name], exact[name])
        assert error <= 2 * limit, f"{name}: {error:.2e} against {limit:.2e}"


def test_switched_disabled_combined_merged_deleted():
    model = adapted(plain("qwen3-moe"))
    model.add_adapter(
        "other",
        LoraConfig(
            r=2, init_lora_weights=False, target_modules=[], target_parameters=EXPERTS, use_rslora=True
        ),
    )
    ours, theirs = both(model)
    steps = {
        "other": lambda m: m.set_adapter("other"),
        "both": lambda m: m.base_model.set_adapter(["default", "other"]),
        "none": lambda m: m.base_model.disable_adapter_layers(),
        "again": lambda m: (m.base_model.enable_adapter_layers(), m.set_adapter("default")),
        "merged": lambda m: m.merge_adapter(),
        "unmerged": lambda m: m.unmerge_adapter(),
        "deleted": lambda m: m.delete_adapter("default"),
    }
    outputs = []
    for step in steps.values():
        logits = []
        for each in (ours, theirs):
            step(each)
            logits.append(each(input_ids=IDS).logits)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
        outputs.append(logits[0])
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])
    assert set(fastpeft.report(ours).calls) == {"fused", "base"}
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_a_matrix_of_a_module_is_a_parameter_too():
    options = {"target_parameters": ["q_proj.weight", "embed_tokens.weight"]}
    ours, theirs = both(adapted(plain("mixtral"), **options))
    assert_same(ours, theirs)
    report = fastpeft.report(ours)
    assert report.calls == {"fused": 2, "peft": 1}
    assert report.reasons == {"weight + B A formed for embedding": 1}


class Odd(nn.Module):
    """Reads its weight in ways that no stand-in knows, among some that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        """x [rows, 5]."""
        whole = self.weight
        assert whole.shape == (3, 6, 5)
        assert whole.dtype is x.dtype
        assert whole.ndim == whole.dim() == 3
        first = nn.functional.linear(x, whole[0])
        second = x @ whole[torch.tensor(1)].T
        third = (whole[2].mT * 2).sum(0)
        fourth = torch.einsum("ri,eoi->ro", x, whole) + (1 - whole).mean() + whole[0, 1, 2]
        fifth = whole[torch.tensor([2, 0])].transpose(-1, -2).sum()
        return first + second + third + fourth + fifth + whole.abs().max() + len(whole)


class Spelled(Odd):
    """Spells the products in other ways."""

    def forward(self, x):
        whole = self.weight
        first = nn.functional.linear(input=x, weight=whole[0])
        second = nn.functional.linear(x, bias=None, weight=whole[1])
        third = torch.matmul(x, other=torch.transpose(whole[2], dim0=0, dim1=1))
        fourth = torch.matmul(input=x, other=torch.t(input=whole[0]))
        fifth = torch.empty(0)
        with torch.no_grad():
            torch.mm(x, whole[0].mT, out=fifth)
        stack = x.expand(3, -1, -1)
        sixth = torch.bmm(input=stack, mat2=whole.transpose(dim0=-2, dim1=-1)).sum(0)
        ends = torch.arange(1, 4, dtype=torch.int32)
        seventh = torch._grouped_mm(self.wide(x[:3]), whole.mT.new_ones(3, 8, 8), ends).mean()
        return first + second + third + fourth + fifth + sixth + seventh + x[:, [0]] * whole.dim()

    def wide(self, x):
        return nn.functional.pad(x, (0, 3))


class WithOwnProduct(Odd):
    """Hands the weight, and a part of it, to a Function of its own."""

    def forward(self, x):
        assert self.weight.requires_grad == torch.is_grad_enabled()
        return OwnProduct.apply(x, self.weight) + OwnProduct.apply(x, self.weight[1:].mT.mT)


class Holder(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.odd = odd

    def forward(self, x, **kwargs):
        return self.odd(x, **kwargs)


def odd(kind: type[nn.Module] = Odd) -> nn.Module:
    torch.manual_seed(0)
    return adapted(Holder(kind()), target_parameters=["odd.weight"])


def assert_same_training(ours: nn.Module, theirs: nn.Module, **options) -> None:
    x = torch.randn(4, 5)
    gradients = []
    for model in (ours, theirs):
        y = model(x, **options)
        gradients.append(
            [y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]
        )
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_any_other_call_gets_the_sum():
    ours, theirs = both(odd())
    assert_same_training(ours, theirs)
    (reason,) = fastpeft.report(ours).reasons
    assert reason.startswith("weight + B A formed for ")
    assert {"mul", "einsum", "sum"} <= set(reason.removeprefix("weight + B A formed for ").split(", "))


@pytest.mark.parametrize("kind", [Spelled, WithOwnProduct])
def test_a_forward_of_another_kind(kind):
    assert_same_training(*both(odd(kind)))
    ours, theirs = both(odd(kind))
    x = torch.randn(4, 5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_no_adapter_names_are_no_argument_of_the_base():
    layers = [model.base_model.model.odd for model in both(odd())]  # PeftModel itself takes the name away
    assert_same_training(*layers, adapter_names=None)


def test_a_partition_of_zero_3_is_pefts():
    ours, theirs = both(odd())
    for model in (ours, theirs):
        model.base_model.model.odd.get_base_layer().weight.ds_id = 0
    assert_same_training(ours, theirs)
    assert fastpeft.report(ours).reasons == {"weight is partitioned by DeepSpeed's ZeRO-3": 1}


def test_a_forward_that_fails_leaves_the_parameter_in_its_place():
    model = fastpeft.patch(odd())
    holder = model.base_model.model.odd.get_base_layer()
    with pytest.raises(fastpeft.ShapeError, match=r"x \[4, 6\]"):
        model(torch.randn(4, 6))
    assert type(holder.weight) is nn.Parameter
    assert "weight" not in holder.__dict__
    assert not any(isinstance(value, FactoredWeight) for value in vars(holder).values())


def test_unpatched_copied_and_checkpointed():
    ours, theirs = both(adapted(plain("mixtral", "grouped_mm")))
    assert_same(copy.deepcopy(ours), theirs)
    for model in (ours, theirs):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(ours, theirs)
    fastpeft.unpatch(ours)
    assert not any("forward" in layer.__dict__ for _, layer in tuner_layers(ours))
    assert_same(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
def test_under_torch_func(way):
    """Which PEFT's own forward is not: torch.func refuses what it does to set the weight."""
    ours, theirs = both(adapted(plain("mixtral", way)))
    expected = outcome(theirs)
    factors = {name: p.detach() for name, p in ours.named_parameters() if p.requires_grad}

    def loss(factors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(ours, factors, (), {"input_ids": IDS}).logits.square().mean()

    for name, gradient in torch.func.grad(loss)(factors).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_compiled_code_is_pefts():
    ours, theirs = both(odd())
    compiled = torch.compile(ours, backend="eager")
    x = torch.randn(4, 5)
    torch.testing.assert_close(compiled(x), theirs(x))
