"""BitFit: biases alone train, and nothing is kept or computed for weights."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

import fastpeft
from bench.saved import count, state_of
from tests.models import VOCABULARY, gpt2, llama, tokens
from tests.test_patch import assert_unchanged, snapshot
from tests.tolerance import assert_within_rule


def bert() -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 56), nn.GELU(), nn.Linear(56, 8))


def training(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def moved(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda name: name.endswith("bias")),
        ({"target_modules": "all-linear"}, lambda n: n.endswith("bias") and ".ln_" not in n),
        ({"target_modules": ["c_attn", "c_fc"]}, lambda n: n.endswith(("c_attn.bias", "c_fc.bias"))),
        ({"target_modules": r".*\.ln_\d"}, lambda n: n.endswith(("ln_1.bias", "ln_2.bias"))),
        ({"exclude_modules": ["c_attn"]}, lambda n: n.endswith("bias") and "c_attn" not in n),
        ({"layers_to_transform": [1]}, lambda n: n.endswith("bias") and ".h.1." in n),
        ({"modules_to_save": ["ln_f"]}, lambda n: n.endswith("bias") or ".ln_f." in n),
    ],
    ids=["all", "all-linear", "names", "regex", "exclude", "layer", "whole"],
)
def test_which_biases(options, expected):
    model = fastpeft.patch(gpt2(), fastpeft.BitFit(**options))
    names = {name for name, _ in model.named_parameters()}
    wanted = {name for name in names if expected(name)} - {"transformer.ln_f.bias"}
    if "target_modules" not in options and "layers_to_transform" not in options:
        wanted.add("transformer.ln_f.bias")
    assert training(model) == wanted
    assert fastpeft.report(model).trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self):
        return sum(self.count[name] for name in ("mm", "addmm", "bmm", "matmul"))


@contextmanager
def products():
    with Calls() as calls:
        yield calls


def test_no_input_is_kept_and_no_weight_gradient_computed():
    tokens_, sizes = 64, (40, 56)
    x = torch.randn(tokens_, 24)
    model = stack()

    def kept(m):
        return count(lambda: m(x).sum(), [x, *state_of(m)])

    full = kept(model)
    with products() as calls:
        model(x).sum().backward()
    assert calls.products == 3 + 5  # dx and dW of each linear, but for the first one's dx
    model.zero_grad(set_to_none=True)
    fastpeft.patch(model, fastpeft.BitFit(target_modules="all-linear"))
    only_activations = 4 * tokens_ * sum(sizes)  # the two GELUs' inputs, not the linears'
    assert kept(model) == (only_activations, only_activations)
    assert full == (2 * only_activations, 2 * only_activations)
    with products() as calls:
        model(x).sum().backward()
    assert calls.products == 3 + 2
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_transformer_keeps_what_the_frozen_one_keeps():
    def kept(model):
        return count(lambda: model(input_ids=tokens(), labels=tokens()).loss, state_of(model))[0]

    full = kept(gpt2().train())
    frozen = gpt2().train().requires_grad_(False)
    frozen.enable_input_require_grads()
    model = fastpeft.patch(gpt2().train(), fastpeft.BitFit())
    # Below the first norm, whose weight is frozen, nothing wants a gradient: not even its input stays.
    assert kept(frozen) - kept(model) == 4 * tokens().numel() * 32
    assert kept(frozen) < full


def test_gradients_by_the_formula():
    x, dy = torch.randn(64, 24), torch.randn(64, 8)
    model, exact = stack(), stack().double()
    fastpeft.patch(model, fastpeft.BitFit(target_modules="all-linear"))
    plain = stack()
    for m in (model, plain, exact):
        m(x.to(next(m.parameters()).dtype)).backward(dy.to(next(m.parameters()).dtype))
    for i in (0, 2, 4):
        assert_within_rule(model[i].bias.grad, exact[i].bias.grad, plain[i].bias.grad, f"bias {i}")
    assert_within_rule(model[4].bias.grad, dy.double().sum(0), dy.sum(0), "the column sums of dY")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (gpt2, {}),
        (gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [0]}),
        (bert, {"target_modules": ["query", "intermediate.dense"], "modules_to_save": ["classifier"]}),
    ],
    ids=["all", "some", "with-head"],
)
def test_files_hold_the_biases_and_no_more(make, options, tmp_path):
    model = moved(fastpeft.patch(make(), fastpeft.BitFit(**options)))
    fastpeft.save(model, tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.") for key in stored} == training(model)
    again = fastpeft.load(make(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
        assert not torch.equal(again(tokens()).logits, make()(tokens()).logits)
    assert training(again) == training(model)
    fastpeft.load(moved(again), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_folders_that_do_not_fit_change_nothing(tmp_path):
    fastpeft.save(fastpeft.patch(gpt2(), fastpeft.BitFit(target_modules=["c_fc"])), tmp_path / "bitfit")
    fastpeft.save(fastpeft.patch(gpt2(), fastpeft.LoRA(r=2)), tmp_path / "lora")
    model = fastpeft.patch(gpt2(), fastpeft.BitFit())
    before = snapshot(model)
    with pytest.raises(fastpeft.CheckpointError, match="missing in the file"):
        fastpeft.load(model, tmp_path / "bitfit")
    with pytest.raises(fastpeft.CheckpointError, match="'default' is BitFit, the folder holds LoRA"):
        fastpeft.load(model, tmp_path / "lora")
    assert_unchanged(model, before)
    plain = llama()
    before = snapshot(plain)
    with pytest.raises(fastpeft.CheckpointError, match="LlamaForCausalLM has none"):
        fastpeft.load(plain, tmp_path / "bitfit")
    assert_unchanged(plain, before)


def test_unpatch_gives_values_and_flags_back():
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    before = snapshot(model)
    fastpeft.patch(model, fastpeft.BitFit(modules_to_save=["classifier"]))
    moved(model)
    assert not torch.equal(model.classifier.weight, before[0]["classifier.weight"])
    fastpeft.unpatch(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (llama, {}, "BitFit trains biases, and LlamaForCausalLM has none"),
        (gpt2, {"target_modules": ["c_atn"]}, "no module with a bias matches 'c_atn'; .*c_attn"),
        (gpt2, {"exclude_modules": ".*"}, "no bias of GPT2LMHeadModel is left"),
        (gpt2, {"modules_to_save": ["score"]}, "no module of the model matches score"),
    ],
    ids=["no-bias", "typo", "all-excluded", "to-save"],
)
def test_refusals_leave_the_model_alone(make, options, said):
    model = make()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=said):
        fastpeft.patch(model, fastpeft.BitFit(**options))
    assert_unchanged(model, before)


def test_what_bitfit_has_not():
    model = fastpeft.patch(gpt2(), fastpeft.BitFit())
    for verb in (
        lambda: fastpeft.add_adapter(model, "other"),
        lambda: fastpeft.merge(model),
        lambda: fastpeft.set_adapter(model, "default"),
    ):
        with pytest.raises(fastpeft.PatchError, match="patched with BitFit, whose values have no names"):
            verb()
    with (
        pytest.raises(fastpeft.PatchError, match="BitFit trains the base in place"),
        fastpeft.disable_adapters(model),
    ):
        pass
    lora = fastpeft.patch(gpt2(), fastpeft.LoRA(r=2))
    with pytest.raises(fastpeft.ConfigError, match="BitFit does not stand beside others"):
        fastpeft.add_adapter(lora, "other", fastpeft.BitFit())
    with pytest.raises(fastpeft.PatchError, match=r"already patched with BitFit.*; fastpeft.unpatch"):
        fastpeft.patch(model, fastpeft.BitFit(target_modules=["c_fc"]))
    with pytest.raises(fastpeft.ConfigError, match="target_modules: expected a list of module names, got 3"):
        fastpeft.BitFit(target_modules=3)


def test_a_few_layers_at_a_time():
    model = fastpeft.patch(gpt2(), fastpeft.BitFit()).train()
    optimizer = fastpeft.LayerSparseAdamW(
        model, 1e-2, schedule=fastpeft.LISA(1, 1), always_on=["norms"], weight_decay=0.0
    )
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        blocks = {name.split(".")[2] for name in training(model) if ".h." in name}
        assert len(blocks) == 1
    assert losses[-1] < losses[0]
