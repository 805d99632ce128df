"""Every promised architecture: patched plainly and in place like PEFT, trained, saved, merged, unpatched."""

from __future__ import annotations

import copy
import re
import warnings
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.linear import LinearMixin
from tests.architectures import ARCHITECTURES
from tests.tolerance import relative_error

# What a gated MLP's and shared inputs' blocks are found for, of two layers each; "" stands for none.
BLOCKS = {
    "llama": ("self_attn", "mlp"),
    "mistral": ("self_attn", "mlp"),
    "qwen2": ("self_attn", "mlp"),
    "qwen3": ("self_attn", "mlp"),
    "gemma2": ("self_attn", "mlp"),
    "gemma3": ("self_attn", "mlp"),
    "mixtral": ("self_attn",),
    "qwen2-moe": ("self_attn", "shared_expert"),
    "t5": ("EncDecAttention", "DenseReluDense"),
}
STACKED = ("mixtral", "qwen2-moe")
# Lines on what stands beside a block's linears, but is called with another variable than they are.
_ALONE = "not fused, because no other linear that can be fused is called with"
WHY_NOT = {
    "llama": {"model.layers.1.self_attn": f"o_proj: {_ALONE} attn_output"},
    "t5": {"encoder.block.0.layer.0.SelfAttention": f"q: {_ALONE} hidden_states"},
    "whisper": {"model.decoder.layers.1.encoder_attn": f"q_proj: {_ALONE} hidden_states"},
    "deberta": {
        "deberta.encoder.layer.0.attention.self": (
            "in_proj is several linears in one already: one op reads its input once for all"
        )
    },
}
every = pytest.mark.parametrize("name", ARCHITECTURES)
methods = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def _built(name: str) -> nn.Module:
    return ARCHITECTURES[name][0]()


def plain(name: str) -> nn.Module:
    return copy.deepcopy(_built(name))


def output(model: nn.Module, name: str) -> Tensor:
    """All floating-point outputs, in one vector."""
    result = model(**ARCHITECTURES[name][1](), return_dict=True)
    wanted = ("logits", "logits_per_image", "last_hidden_state")
    return torch.cat([result[key].flatten() for key in wanted if result.get(key) is not None])


@cache
def targets(name: str) -> tuple[str, ...]:
    """The modules that fastpeft patches where nothing is asked for."""
    return fastpeft.report(fastpeft.patch(plain(name), fastpeft.LoRA(r=1))).patched


def in_peft(name: str, use_dora: bool) -> PeftModel:
    names = list(targets(name))  # draws, the first time
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=names, init_lora_weights=False, use_dora=use_dora)
    model = get_peft_model(plain(name), config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.mul_(0.3)  # a small update, or rounding grows from layer to layer
            if "magnitude" in parameter_name:
                parameter.mul_(1.0 + 0.1 * torch.rand_like(parameter))
    return model


def trained(model: nn.Module, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, name).square().mean().backward()
    return {
        n.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def assert_same(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    assert relative_error(output(ours, name), output(theirs, name).detach()) <= 1e-5
    found, expected = trained(ours, name), trained(theirs, name)
    assert found.keys() == expected.keys()
    joined = [
        torch.cat([g[key].flatten() / expected[key].norm().clamp(min=1e-30) for key in expected])
        for g in (found, expected)
    ]
    assert relative_error(*joined) <= 1e-3


@every
def test_every_linear_of_the_blocks_is_patched_or_has_a_reason(name):
    model = fastpeft.patch(plain(name), fastpeft.LoRA(r=1))
    report = fastpeft.report(model)
    told = {module.path for module in report.modules}
    linears = {
        p for p, m in plain(name).named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }
    assert linears <= told
    if name in STACKED:
        stacked = [module.detail for module in report.modules if "3-D weight" in module.detail]
        assert len(stacked) == 4  # gate_up and down, two layers
        assert all("target_parameters=['experts." in detail for detail in stacked)
    assert all(module.detail for module in report.modules)
    for expected in BLOCKS.get(name, ()):
        assert any(
            line.split(":")[0].endswith(expected) and "are one op" in line for line in report.blocks
        ), expected


def side_by_side(model: nn.Module) -> dict[str, list[str]]:
    """The linears with adapters of every module that has two or more of them."""
    found = {}
    for path, module in model.named_modules():
        names = [name for name, child in module.named_children() if isinstance(child, LinearMixin)]
        if len(names) > 1:
            found[path] = names
    return found


@every
def test_linears_side_by_side_are_in_a_block_or_the_report_says_why_not(name):
    model = fastpeft.patch(plain(name), fastpeft.LoRA(r=1))
    report = fastpeft.report(model)
    assert side_by_side(model) or name == "falcon"  # each of its linears is alone in its module
    for path, names in side_by_side(model).items():
        lines = [line.removeprefix(f"{path}: ") for line in report.blocks if line.startswith(f"{path}: ")]
        about = {n for line in lines for n in re.split(r"[,: ()]+", line.partition(" because ")[0])}
        assert about.issuperset(names), (path, names, lines)
    for path, line in WHY_NOT.get(name, {}).items():
        assert f"{path}: {line}" in report.blocks


@pytest.mark.parametrize("name", STACKED)
def test_adapters_of_peft_on_stacked_experts(name):
    """What the reason of a skipped 3-D weight says to do."""
    config = LoraConfig(
        r=4,
        target_modules=list(targets(name)),
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(5)
    theirs = get_peft_model(plain(name), config).eval()
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "lora_B" in parameter_name:
                parameter.mul_(0.3)
    ours = fastpeft.patch(copy.deepcopy(theirs))
    assert_same(ours, theirs, name)
    assert any("experts" in key for key in trained(ours, name))
    report = fastpeft.report(ours)
    assert len(report.patched) == len(targets(name)) + 4
    assert set(report.calls) == {"fused"}
    for model in (ours, theirs):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert_same(ours, theirs, name)


@every
@methods
def test_like_peft(name, use_dora, tmp_path):
    """Through PEFT's file into a plain model; then steps, files both ways, merging and back."""
    theirs = in_peft(name, use_dora)
    theirs.save_pretrained(tmp_path / "theirs")
    model = fastpeft.load(plain(name), tmp_path / "theirs")
    assert_same(model, theirs, name)
    before = output(model, name).detach()
    fastpeft.merge(model)
    assert relative_error(output(model, name), before) <= 1e-4
    fastpeft.unmerge(model)
    assert torch.equal(output(model, name), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(2):
        loss = output(model, name).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    fastpeft.save(model, tmp_path / "ours")
    after = output(model, name).detach()
    assert relative_error(output(fastpeft.load(plain(name), tmp_path / "ours"), name), after) <= 1e-6
    again = PeftModel.from_pretrained(plain(name), tmp_path / "ours").eval()
    assert relative_error(output(again, name), after) <= 1e-5
    fastpeft.unpatch(model)
    assert torch.equal(output(model, name), output(plain(name), name))


@every
@methods
def test_in_place(name, use_dora):
    theirs = in_peft(name, use_dora)
    ours = fastpeft.patch(copy.deepcopy(theirs))
    assert_same(ours, theirs, name)
    report = fastpeft.report(ours)
    assert not report.reasons
    assert len(report.patched) == len(targets(name))
