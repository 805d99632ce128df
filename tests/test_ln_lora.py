"""LN-LoRA in models: where it is, what it computes, files, the way back, and why it cannot be merged."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft import LNLoRA
from fastpeft.layers.ln_lora import CHILD
from fastpeft.methods.ln_lora import ln_lora_adapters
from fastpeft.sparse.suppression import Responses
from tests import architectures
from tests.models import gpt2, llama, tokens
from tests.test_bottleneck import logits, moved
from tests.test_patch import assert_unchanged, snapshot
from tests.tolerance import assert_within_rule


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5", "clip", "deberta-v2"])
def test_architectures(name):
    make, inputs = architectures.ARCHITECTURES[name]
    model = make()
    before = snapshot(model)
    with torch.no_grad():
        base = model(**inputs())[0]
    targets = set(fastpeft.report(fastpeft.patch(make(), fastpeft.LoRA())).patched)
    fastpeft.patch(model, LNLoRA(r=3))
    assert set(fastpeft.report(model).patched) == targets, "what LoRA's default means"
    with torch.no_grad():
        assert torch.equal(model(**inputs())[0], base), "it starts as its base"
        moved(model)
        assert not torch.equal(model(**inputs())[0], base)
    fastpeft.unpatch(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_layer_by_the_formula(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 17)).to(dtype)
    fastpeft.patch(model, LNLoRA(r=6, lora_alpha=9, target_modules="all-linear"))
    moved(model)
    adapter = model[0].ln_lora
    parameters = [adapter.lora_A, adapter.norm_weight, adapter.norm_bias, adapter.lora_B]
    x, dy = torch.randn(3, 13, 24, dtype=dtype), torch.randn(3, 13, 17, dtype=dtype)
    results = {}
    for name, kind in (("exact", torch.float64), ("plain", dtype)):
        own = [t.detach().to(kind).requires_grad_() for t in (x, model[0].weight, model[0].bias, *parameters)]
        given, W, bias, A, g, b, B = own
        y = F.linear(given, W, bias) + 1.5 * F.linear(F.layer_norm(F.linear(given, A), (6,), g, b), B)
        y.backward(dy.to(kind))
        results[name] = [y.detach(), given.grad, *(t.grad for t in own[3:])]
    x.requires_grad_()
    y = model(x)
    y.backward(dy)
    found = [y.detach(), x.grad, *(p.grad for p in parameters)]
    for what, mine, exact, plain in zip(
        ("y", "dx", "dA", "dg", "db", "dB"), found, results["exact"], results["plain"], strict=True
    ):
        assert_within_rule(mine, exact, plain, what)


def test_numbers_that_train():
    model = fastpeft.patch(llama(), LNLoRA(r=4, target_modules=["q_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(CHILD in name for name in trained)
    assert fastpeft.report(model).trainable_parameters == 2 * (4 * 32 + 4 + 4 + 32 * 4)
    assert "LN-LoRA(r=4, scaling=4)" in str(fastpeft.report(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_files_and_the_way_back(make, dtype, tmp_path):
    model = make(dtype)
    before = snapshot(model)
    fastpeft.patch(model, LNLoRA(r=6, lora_alpha=3, modules_to_save=["lm_head"]))
    assert {p.dtype for n, p in model.named_parameters() if CHILD in n} == {torch.float32}
    moved(model)
    fastpeft.save(model, tmp_path)
    again = fastpeft.load(make(dtype), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(make(dtype)))
    fastpeft.load(moved(again), tmp_path)
    assert torch.equal(logits(again), logits(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        moved(twin)  # its hooks ask its own adapters
        assert not torch.equal(logits(twin), logits(model))
        fastpeft.unpatch(twin)
        assert torch.equal(logits(twin), logits(make(dtype)))
        assert not list(ln_lora_adapters(twin))
    fastpeft.unpatch(model)
    assert_unchanged(model, before)


def test_peft_refuses_the_files(tmp_path):
    """It would read A and B as a LoRA without the norm."""
    fastpeft.save(fastpeft.patch(llama(), LNLoRA(r=4)), tmp_path)
    with pytest.raises(KeyError, match="LN_LORA"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


def test_a_linear_under_two_names_has_one(tmp_path):
    linear = nn.Linear(8, 8)
    model = fastpeft.patch(nn.ModuleDict({"a": linear, "b": linear}), LNLoRA(r=2, target_modules=["a", "b"]))
    assert fastpeft.report(model).patched == ("a", "b")
    assert len(linear._forward_hooks) == 1
    assert fastpeft.report(model).trainable_parameters == 8 * 2 * 2 + 4
    fastpeft.unpatch(model)
    assert not linear._forward_hooks


def test_a_merge_is_impossible():
    model = moved(fastpeft.patch(llama(), LNLoRA(r=4)))
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=r"merge: .* B LN\(A x\) is not linear in x"):
        fastpeft.merge(model)
    with pytest.raises(
        fastpeft.PatchError, match="add_adapter: the model is patched with LNLoRA, whose values"
    ):
        fastpeft.add_adapter(model, "second", fastpeft.LoRA())
    assert_unchanged(model, before)
    other = fastpeft.patch(llama(), fastpeft.LoRA(r=2))
    with pytest.raises(fastpeft.ConfigError, match="LNLoRA does not stand beside others"):
        fastpeft.add_adapter(other, "second", LNLoRA())


def test_disabled_it_is_the_base():
    model = moved(fastpeft.patch(llama(), LNLoRA(r=6)))
    adapted = logits(model)
    with fastpeft.disable_adapters(model):
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), adapted)


def test_dropout_is_of_the_adapters_input_and_of_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    base = copy.deepcopy(model)
    moved(fastpeft.patch(model, LNLoRA(r=4, lora_dropout=0.5, target_modules="all-linear"))).train()
    x = torch.randn(5, 64)
    torch.manual_seed(7)
    y = model(x)
    adapter = model[0].ln_lora
    torch.manual_seed(7)
    n = F.layer_norm(F.dropout(x, 0.5) @ adapter.lora_A.T, (4,), adapter.norm_weight, adapter.norm_bias)
    torch.testing.assert_close(y, base(x) + 4 * n @ adapter.lora_B.T)
    model.eval()
    assert torch.equal(model(x), model(x))
    assert "LN-LoRA(r=4, scaling=4, dropout=0.5)" in repr(model)


@torch.no_grad()
def test_suppressed_is_a_share():
    model = moved(fastpeft.patch(llama(), LNLoRA(r=6, target_modules=["q_proj"])))
    x = torch.randn(2, 5, 32)
    layers = [model.model.layers[i].self_attn.q_proj for i in range(2)]
    base = [llama().model.layers[i].self_attn.q_proj(x) for i in range(2)]
    whole = [layer(x) for layer in layers]
    with Responses(model, [f"model.layers.{i}" for i in range(2)]).applied() as suppress:
        suppress(frozenset({1}), 0.25)
        found = [layer(x) for layer in layers]
    torch.testing.assert_close(found[0], whole[0])
    torch.testing.assert_close(found[1], base[1] + 0.25 * (whole[1] - base[1]))


def test_training_with_a_schedule_and_compiled():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = fastpeft.patch(llama(), LNLoRA(r=4)).train()
    optimizer = fastpeft.LayerSparseAdamW(model, 1e-2, schedule=fastpeft.IST(layers=1, update_every=3))
    losses = []
    for _ in range(9):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(optimizer.sparse.scores)
    model = moved(fastpeft.patch(llama(), LNLoRA(r=4))).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for setup in ("checkpointing", "compiled"):
        model.zero_grad()
        if setup == "checkpointing":
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
            for block in model.model.layers:
                block.forward = torch.compile(block.forward, backend="aot_eager")
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], msg=f"{setup}: {name}")


def test_a_plan_counts_it():
    plain = fastpeft.plan(llama(), fastpeft.LoRA(r=8), 2, 64)
    ours = fastpeft.plan(llama(), LNLoRA(r=8), 2, 64)
    linears = 2 * 7
    assert ours.gradients == plain.gradients + linears * 2 * 8 * 4
    assert ours.optimizer_state == 2 * ours.gradients + linears * 4 * 4  # and a step count for each


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 1}, "r: expected a whole number of at least 2, got 1"),
        ({"lora_alpha": 0}, "lora_alpha: expected a number above 0, got 0"),
        ({"lora_dropout": 1}, r"lora_dropout: expected a number in \[0, 1\), got 1"),
        ({"target_modules": []}, "target_modules: expected at least one name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(options, said):
    with pytest.raises(fastpeft.ConfigError, match=said):
        LNLoRA(**options)


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = llama()
    before = snapshot(model)
    for config, said in (
        (
            LNLoRA(target_modules=["embed_tokens"]),
            "embed_tokens: LN-LoRA is for linears, and this is Embedding",
        ),
        (LNLoRA(target_modules=["q_prjo"]), "no module of the model matches 'q_prjo'"),
        (LNLoRA(modules_to_save=["score"]), "no module of the model matches score"),
    ):
        with pytest.raises(fastpeft.PatchError, match=said):
            fastpeft.patch(model, config)
        assert_unchanged(model, before)
    fastpeft.save(fastpeft.patch(llama(), LNLoRA(r=6)), tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    assert content["peft_type"] == "LN_LORA"
    file.write_text(json.dumps({**content, "r": 7}))
    with pytest.raises(fastpeft.CheckpointError, match="declared r=7, got 6"):
        fastpeft.load(model, tmp_path)
    file.write_text(json.dumps({**content, "use_dora": True}))
    with pytest.raises(fastpeft.CheckpointError, match="LNLoRA: expected its own fields, got use_dora"):
        fastpeft.load(model, tmp_path)
    assert_unchanged(model, before)
    file.write_text(json.dumps(content))
    with pytest.raises(fastpeft.CheckpointError, match=r"scaling: the model has 2, the folder 2\.66667"):
        fastpeft.load(fastpeft.patch(llama(), LNLoRA(r=6, lora_alpha=12)), tmp_path)
    with pytest.raises(fastpeft.CheckpointError, match="is LoRA, the folder holds LNLoRA"):
        fastpeft.load(fastpeft.patch(llama(), fastpeft.LoRA(r=6)), tmp_path)
