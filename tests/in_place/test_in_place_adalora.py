"""PEFT's AdaLoRA models, accelerated in place: the same numbers, and PEFT's allocator as ever."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import fastpeft
from tests.models import gpt2, llama, tokens
from tests.test_adalora import OPTIONS, logits, pefts, without_dropout

pytestmark = pytest.mark.filterwarnings("ignore")


def randomised(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_pefts(make, dtype):
    expected, model = (randomised(without_dropout(pefts(lambda: make(dtype)))).train() for _ in range(2))
    fastpeft.patch(model)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.1}
    losses = [m(input_ids=tokens(), labels=tokens()).loss for m in (model, expected)]
    torch.testing.assert_close(*losses, **tolerance)
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, **tolerance, msg=name)
    report = fastpeft.report(model)
    assert report.calls["fused"] > 0
    assert not report.reasons
    assert "accelerated, " in str(report)
    assert "default: AdaLoRA(r=6)" in str(report)


def test_pefts_allocator_and_files(tmp_path):
    options = {**OPTIONS, "total_step": 12, "tinit": 1, "tfinal": 3}
    models = [pefts(llama, **options).train(), fastpeft.patch(pefts(llama, **options)).train()]
    models[1].load_state_dict(models[0].state_dict())
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for step in range(12):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    patterns = [model.peft_config["default"].rank_pattern for model in models]
    assert patterns[0] == patterns[1]
    assert sum(sum(kept) for kept in patterns[0].values()) == 2 * 14
    models[1].save_pretrained(tmp_path)
    again = fastpeft.patch(peft.PeftModel.from_pretrained(llama(), tmp_path))
    torch.testing.assert_close(logits(again), logits(models[1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(models[0]), logits(again), rtol=1e-3, atol=1e-3)
    reasons = fastpeft.report(again).reasons
    assert set(reasons) <= {"an adapter of rank 0"}
    fastpeft.unpatch(again)
    assert all("forward" not in module.__dict__ for module in again.modules())


def test_disabled_merged_and_not_linear():
    model = fastpeft.patch(randomised(pefts(llama)))
    first = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-4)
    both = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    config = peft.AdaLoraConfig(**OPTIONS, target_modules=["0", "2"])
    mixed = fastpeft.patch(peft.get_peft_model(both, config))
    mixed(torch.randn(2, 3, 4, 4))
    assert "SVDConv2d has no fused forward" in str(fastpeft.report(mixed))
    assert fastpeft.report(mixed).calls["fused"] == 1
