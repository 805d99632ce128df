"""PEFT's preparation for hot-swapping in compiled models: other ranks and alphas without compiling anew."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

import fastpeft
from tests.in_place.cases import logits, peft_model
from tests.models import tokens

TARGETS = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}


@pytest.mark.parametrize("patch_first", [False, True], ids=["prepare-patch", "patch-prepare"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_another_rank_and_alpha_without_a_recompilation(use_dora, patch_first, tmp_path):
    options = {**TARGETS, "use_dora": use_dora}
    peft_model(seed=3, **{**options, "r": 6, "lora_alpha": 11}).save_pretrained(tmp_path)
    untouched = peft_model(r=3, **options)
    model = copy.deepcopy(untouched)
    prepare_model_for_compiled_hotswap(untouched, target_rank=8)
    if patch_first:
        fastpeft.patch(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    fastpeft.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = compiled(tokens(), use_cache=False).logits
        torch.testing.assert_close(first, logits(untouched), rtol=1e-4, atol=1e-5)
        for each in (model, untouched):
            hotswap_adapter(each, str(tmp_path), adapter_name="default")
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = compiled(tokens(), use_cache=False).logits
    torch.testing.assert_close(second, logits(untouched), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, rtol=1e-2)
    torch.testing.assert_close(logits(model), logits(untouched), rtol=1e-4, atol=1e-5)
    assert fastpeft.report(model).calls.keys() == {"fused"}
