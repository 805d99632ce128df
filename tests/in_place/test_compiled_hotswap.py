"""PEFT's preparation for hot-swapping in compiled models: other ranks and alphas without compiling anew."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file

import fastpeft
from fastpeft.in_place.install import tuner_layers
from tests.in_place.cases import logits, peft_model
from tests.models import tokens

TARGETS = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}


def swap(model, folder):
    hotswap_adapter(model, str(folder), adapter_name="default")


def write(model, folder):
    """What a swap comes to, in the Parameters and the scaling that are there."""
    new = load_file(folder / "adapter_model.safetensors")
    for path, layer in tuner_layers(model):
        for kind in ("lora_A", "lora_B"):
            weight, values = getattr(layer, kind)["default"].weight, new[f"{path}.{kind}.weight"]
            weight.zero_()[: values.shape[0], : values.shape[1]] = values
        layer.lora_magnitude_vector["default"].weight.copy_(new[f"{path}.lora_magnitude_vector"])
        layer.scaling["default"].fill_(11 / 6)


@pytest.mark.parametrize("patch_first", [False, True], ids=["prepare-patch", "patch-prepare"])
@pytest.mark.parametrize(
    ("use_dora", "exchange"), [(False, swap), (True, write)], ids=["lora", "dora-by-hand"]
)
def test_another_rank_and_alpha_without_a_recompilation(use_dora, exchange, patch_first, tmp_path):
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
            exchange(each, tmp_path)
        with torch._dynamo.config.patch(error_on_recompile=True):
            second = compiled(tokens(), use_cache=False).logits
    torch.testing.assert_close(second, logits(untouched), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, rtol=1e-2)
    torch.testing.assert_close(logits(model), logits(untouched), rtol=1e-4, atol=1e-5)
    assert fastpeft.report(model).calls.keys() == {"fused"}


def test_pefts_swap_does_not_know_dora_s_magnitude(tmp_path):
    """Why the test above writes it by hand: PEFT 0.21 fails on its own model."""
    peft_model(seed=3, **TARGETS, use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="lora_magnitude_vector"):
        swap(peft_model(**TARGETS, use_dora=True), tmp_path)
