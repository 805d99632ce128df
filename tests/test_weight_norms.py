"""LISA's weight norms: of known weights, of adapters by their factors, over a training."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft import LoRA, ParallelAdapter, VeRA
from fastpeft.errors import ConfigError
from fastpeft.instruments import Change, Removal, WeightNorms, effective
from fastpeft.instruments.plots import plot_changes, plot_removal, plot_weight_norms
from tests.models import gpt2, llama, tokens

FP32 = 8 * torch.finfo(torch.float32).eps  # products and sums are in fp32, whatever the weights are in


def norm(*tensors):
    return sum(t.detach().double().square().sum() for t in tensors).sqrt().item()


def test_known_norms():
    blocks = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(3, 4)}) for _ in range(2))
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 2), "layers": blocks, "head": nn.Linear(1, 2, bias=False)}
    )
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
        blocks[1]["proj"].weight.fill_(3.0)
    found = WeightNorms(model).measure()
    assert found == {
        "embed": pytest.approx(40**0.5),
        "layers.0": pytest.approx((4 * 12 + 4 * 4) ** 0.5),
        "layers.1": pytest.approx((9 * 12 + 4 * 4) ** 0.5),
        "head": pytest.approx(8**0.5),
    }


def test_layers_of_a_language_model_and_a_tied_head_counts_once():
    untied = WeightNorms(llama()).measure()
    assert list(untied) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    assert untied["model.layers.1"] == pytest.approx(norm(*llama().model.layers[1].parameters()), rel=1e-6)
    tied = WeightNorms(llama(tied=True)).measure()
    assert list(tied) == list(untied)[:-1]


ADAPTERS = {
    "lora": LoRA(r=3, init_lora_weights=False, lora_dropout=0.3),
    "dora": LoRA(r=3, init_lora_weights=False, use_dora=True),
    "vera": VeRA(r=5, init_weights=False),
    "embedding": LoRA(r=3, init_lora_weights=False, target_modules=["embed_tokens", "q_proj"]),
}


def trained(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_count_by_their_factors(method, make, dtype, monkeypatch):
    if method == "embedding" and make is gpt2:
        pytest.skip("GPT-2 has no modules of these names")
    model = trained(fastpeft.patch(make(dtype), ADAPTERS[method]))
    base, merged = make(dtype), copy.deepcopy(model)
    for module in merged.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight.data = module.weight.data.double()
    fastpeft.merge(merged)

    def refuse(*_):
        raise AssertionError("a whole weight was made")

    monkeypatch.setattr(effective, "merged_weight", refuse)
    found, update = WeightNorms(model).measure(), WeightNorms(model, what="update").measure()
    before = dict(base.named_parameters())
    for layer in found:
        weights = {
            n: p
            for n, p in merged.named_parameters()
            if n.startswith(f"{layer}.") and n.endswith(("weight", "bias"))
        }
        assert found[layer] == pytest.approx(norm(*weights.values()), rel=FP32), layer
        moved = norm(*(p.double() - before[n].double() for n, p in weights.items()))
        assert update[layer] == pytest.approx(moved, rel=10 * FP32), layer


def test_dora_beside_others_and_inactive_disabled_and_merged_adapters():
    model = trained(fastpeft.patch(llama(), LoRA(r=2, init_lora_weights=False, use_dora=True)))
    fastpeft.add_adapter(model, "other", LoRA(r=3, init_lora_weights=False))
    base = WeightNorms(llama()).measure()
    with fastpeft.disable_adapters(model):
        assert WeightNorms(model).measure() == base
    for active in ("default", "other", ["default", "other"], ["other", "default"]):
        fastpeft.set_adapter(model, active)
        unmerged = WeightNorms(model).measure()
        merged = WeightNorms(fastpeft.merge(copy.deepcopy(model))).measure()
        assert unmerged == {layer: pytest.approx(n, rel=1e-5) for layer, n in merged.items()}
        assert unmerged["model.layers.0"] != pytest.approx(base["model.layers.0"], rel=1e-3)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_pefts_adapters_count_too(dora, accelerated):
    torch.manual_seed(0)
    names = ["embed_tokens", "q_proj", "down_proj"]
    config = LoraConfig(r=3, init_lora_weights=False, use_dora=dora, target_modules=names)
    model = trained(get_peft_model(llama(), config))
    if accelerated:
        fastpeft.patch(model)
    found = WeightNorms(model).measure()
    expected = WeightNorms(copy.deepcopy(model).merge_and_unload()).measure()
    assert list(found.values()) == [pytest.approx(n, rel=1e-5) for n in expected.values()]
    assert found["base_model.model.model.layers.0"] > 1.1 * WeightNorms(llama()).measure()["model.layers.0"]


def test_a_series_or_parallel_adapter_is_a_part_of_its_block():
    model = trained(fastpeft.patch(llama(), ParallelAdapter(bottleneck_size=4)))
    assert WeightNorms(model).measure()["model.layers.0"] == pytest.approx(
        norm(*model.model.layers[0].parameters()), rel=1e-6
    )


def test_recorded_after_every_step_and_meaned():
    model = llama().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = WeightNorms(model)
    with pytest.raises(ConfigError, match="nothing was recorded"):
        recorder.mean()
    handle = recorder.attach(optimizer)
    seen = []
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(norm(model.lm_head.weight))
    handle.remove()
    optimizer.step()
    assert recorder.history["lm_head"] == pytest.approx(seen, rel=1e-6)
    assert len(set(seen)) == 3
    assert recorder.mean()["lm_head"] == pytest.approx(sum(seen) / 3, rel=1e-6)
    with pytest.raises(ConfigError, match="what: expected one of weights, update, got 'all'"):
        WeightNorms(model, what="all")


def drawn(tmp_path):
    changes = [Change(f"layers.{i}.q", i, "q", 0.1 * i, 0.2 + i % 2) for i in range(4)]
    return {
        "norms": (plot_weight_norms, {"full": {"embed": 1.0, "layers.0": 3.0}, "lora": {"layers.0": 2.0}}),
        "changes": (plot_changes, {"lora": changes, "full": changes[:3]}),
        "removal": (plot_removal, {"greedy": Removal(("a", "b"), (1.0, 1.5, 2.0))}),
    }


def test_plots(tmp_path, monkeypatch):
    for name, (plot, found) in drawn(tmp_path).items():
        for ending in ("png", "svg"):
            plot(found, tmp_path / f"{name}.{ending}")
            assert (tmp_path / f"{name}.{ending}").stat().st_size > 3000
    for plot, _ in drawn(tmp_path).values():
        with pytest.raises(ConfigError, match="there is nothing to draw"):
            plot({}, tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for plot, found in drawn(tmp_path).values():
        with pytest.raises(ConfigError, match="drawing needs matplotlib: pip install matplotlib"):
            plot(found, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
