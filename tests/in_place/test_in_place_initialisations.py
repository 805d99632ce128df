"""PEFT's initialisations that read or rewrite the base, on an accelerated model: what PEFT makes."""

from __future__ import annotations

import copy
import inspect

import peft.tuners.lora.layer as lora_layer
import pytest
import torch
from peft import EvaConfig, LoftQConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.utils import loftq_utils

import fastpeft
from tests.in_place.cases import logits, pair
from tests.models import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture
def _loftq_without_a_gpu(monkeypatch):
    """LoftQ quantises on a GPU, whose name stands in its code."""
    code = inspect.getsource(loftq_utils.loftq_init)
    assert code.count('"cuda"') == 1
    names = {**loftq_utils.__dict__}
    exec(code.replace('"cuda"', '"cpu"'), names)
    monkeypatch.setattr(lora_layer, "loftq_init", names["loftq_init"])


@pytest.mark.usefixtures("_loftq_without_a_gpu")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal", "loftq"])
def test_beside_a_dora_adapter_whose_norm_is_kept(init):
    """The new adapter rewrites W below the old one, of whose norm W is a part."""
    patched, untouched = pair(use_dora=True)
    before = logits(patched)
    loftq = {"loftq_config": LoftQConfig(loftq_bits=4)} if init == "loftq" else {}
    for model in (patched, untouched):
        torch.manual_seed(5)
        model.add_adapter("new", LoraConfig(r=2, init_lora_weights=init, target_modules=TARGETS, **loftq))
    old = logits(patched)
    torch.testing.assert_close(old, logits(untouched), rtol=1e-4, atol=1e-5)
    assert torch.allclose(old, before, rtol=1e-2, atol=1e-3) is (init == "orthogonal")  # it leaves W alone
    for model in (patched, untouched):
        model.set_adapter("new")
    torch.testing.assert_close(logits(patched), logits(untouched), rtol=1e-4, atol=1e-5)
    for model in (patched, untouched):
        model.base_model.set_adapter(["default", "new"])
    torch.testing.assert_close(logits(patched), logits(untouched), rtol=1e-4, atol=1e-5)
    assert not fastpeft.report(patched).reasons


@pytest.mark.parametrize("rho", [1.0, 2.0], ids=["one-rank", "ranks-moved"])
def test_eva(rho):
    config = LoraConfig(
        r=4,
        init_lora_weights="eva",
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        eva_config=EvaConfig(rho=rho),
    )
    batch = {"input_ids": tokens(8, 12), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
    models = [get_peft_model(llama(), copy.deepcopy(config)) for _ in range(2)]
    fastpeft.patch(models[0])
    for model in models:
        torch.manual_seed(0)
        initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)
    patched, untouched = (model.state_dict() for model in models)
    assert patched.keys() == untouched.keys()
    for name, tensor in patched.items():
        torch.testing.assert_close(tensor, untouched[name], rtol=1e-3, atol=1e-4, msg=name)
    ranks = {tensor.shape[0] for name, tensor in patched.items() if ".lora_A." in name}
    assert (len(ranks) > 1) is (rho > 1)
    with torch.no_grad():
        for model in models:
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_()
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-3, atol=1e-3)
    report = fastpeft.report(models[0])
    assert report.calls["fused"] > 0
    assert len(report.patched) == sum(".lora_A." in name for name in patched)
