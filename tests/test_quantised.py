"""Quantised bases keep their own product and get our update: like PEFT on the same base."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import fastpeft
from tests.in_place.cases import assert_same_as_peft
from tests.models import tokens
from tests.quantised import KINDS
from tests.tolerance import relative_error

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
methods = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on torchao's merging, bitsandbytes on casts
        yield


def peft_model(make, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **options)
    model = get_peft_model(make(dtype), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def step(model) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@kinds
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_models_in_place(make, use_dora, dtype):
    if make is KINDS["torchao-int8"] and use_dora:
        pytest.skip("PEFT has no DoRA on torchao's weights")
    untouched = peft_model(make, dtype, use_dora=use_dora)
    patched = fastpeft.patch(copy.deepcopy(untouched))
    for model in (patched, untouched):
        output = model(input_ids=tokens(), labels=tokens())
        output.loss.backward()
    ours, theirs = (
        {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (patched, untouched)
    )
    assert ours.keys() == theirs.keys()
    loose = 1e-4 if dtype is torch.float32 else 0.1
    for name, gradient in ours.items():
        assert relative_error(gradient, theirs[name]) <= loose, name
    assert fastpeft.report(patched).calls == {"added": 8}


@methods
def test_the_2x_rule_on_a_dequantised_base(use_dora):
    """nf4's numbers, unpacked: fp64 can then say what is right."""
    model = peft_model(KINDS["nf4"], use_dora=use_dora)
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        base = getattr(module, "base_layer", None)
        if base is not None and hasattr(base.weight, "quant_state"):
            numbers = torch.nn.Linear(base.in_features, base.out_features, bias=False)
            from bitsandbytes.functional import dequantize_4bit

            numbers.weight = torch.nn.Parameter(
                dequantize_4bit(base.weight.data, base.weight.quant_state), False
            )
            module.base_layer = numbers
    assert_same_as_peft(fastpeft.patch(copy.deepcopy(plain)), plain)
    patched = fastpeft.patch(model)
    torch.testing.assert_close(patched(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-4)


@kinds
@methods
def test_plain_models_like_peft(make, use_dora, tmp_path):
    """patch, train, save, load: without PEFT's modules, the numbers PEFT gives for the file."""
    dtype = torch.bfloat16 if make is KINDS["int8"] else torch.float32
    if make is KINDS["torchao-int8"] and use_dora:
        model = fastpeft.patch(make(dtype), fastpeft.LoRA(r=2, target_modules=TARGETS, use_dora=True))
        losses = step(model)
        assert losses[-1] < losses[0]
        return
    theirs = peft_model(make, dtype, use_dora=use_dora)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastpeft.load(make(dtype), tmp_path / "theirs")
    loose = 1e-5 if dtype is torch.float32 else 0.02
    assert relative_error(ours(tokens()).logits, theirs(tokens()).logits) <= loose
    losses = step(ours)
    assert losses[-1] < losses[0]
    if dtype is torch.float32:
        assert losses == pytest.approx(step(theirs), rel=1e-3)
    fastpeft.save(ours, tmp_path / "ours")
    again = fastpeft.load(make(dtype), tmp_path / "ours")
    assert torch.equal(again(tokens()).logits, ours(tokens()).logits)
    in_peft = PeftModel.from_pretrained(make(dtype), tmp_path / "ours").eval()
    assert relative_error(ours(tokens()).logits, in_peft(tokens()).logits) <= loose
    with pytest.raises(fastpeft.PatchError, match="quantised and cannot take an update"):
        fastpeft.merge(ours)
    expected = make(dtype)(tokens()).logits
    with fastpeft.disable_adapters(ours):
        assert torch.equal(ours(tokens()).logits, expected)
    fastpeft.unpatch(ours)
    assert torch.equal(ours(tokens()).logits, expected)
    assert not any("LoRA" in type(module).__name__ for module in ours.modules())


@kinds
def test_copies_are_whole(make):
    model = fastpeft.patch(make(torch.float32), fastpeft.LoRA(r=2, init_lora_weights=False))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    fastpeft.unpatch(twin)
    assert fastpeft.report(model).patched
