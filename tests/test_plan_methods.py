"""Every method that has a name is planned to the byte, and keeps what its paper says it keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fastpeft
from bench import saved
from fastpeft import BitFit, LoRA, TopK
from fastpeft.__main__ import main as command
from fastpeft.errors import ConfigError, PatchError
from fastpeft.planning import methods
from fastpeft.planning.names import NAMES, named
from tests.test_plan import BATCH, SEQUENCE, assert_same, config, measured, real_model

# Names whose plan is compared here; the others' is in test_plan.py.
NEW = ("lora-fa:4", "vera:8", "bitfit", "series:8", "parallel:8", "prefix:5", "prompt:5")


def options(name):
    return {"attention_bias": True} if name == "bitfit" else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NEW)
def test_a_named_methods_plan_is_a_real_step_to_the_byte(name, dtype):
    plan = fastpeft.plan(real_model(dtype=dtype, **options(name)), name, BATCH, SEQUENCE)
    assert_same(plan, measured(real_model(dtype=dtype, **options(name)), name))


@pytest.mark.parametrize("name", NEW)
def test_a_named_methods_depth_is_extended_exactly(name):
    quick, exact = (
        fastpeft.plan(
            config(7, **options(name)), name, BATCH, SEQUENCE, device="cuda", exact_depth=deep
        )
        for deep in (False, True)
    )  # fmt: skip
    assert quick == exact


def test_names_with_numbers_and_their_labels():
    found = {text: methods.parse(text).label for text in (*NAMES, "lora-fa:3", "series:64", "prompt:7")}
    assert found["lora-fa:3"] == "LoRA-FA r=3"
    assert found["dora"] == "DoRA r=16"
    assert found["vera"] == "VeRA r=256"
    assert found["series:64"] == "SeriesAdapter size 64"
    assert found["prompt:7"] == "PromptTuning tokens 7"
    assert found["bitfit"] == "BitFit"
    assert found["full"] == "full"
    assert named("prefix:9") == fastpeft.PrefixTuning(num_virtual_tokens=9)
    assert named(" LoRA-FA:2 ") == LoRA(r=2, freeze_lora_A=True)
    for wrong in ("bitfit:3", "badam:2", "lora:", "lora-fb", ":3", "lora:-1", ""):
        with pytest.raises(ConfigError, match="method: expected one of full, lora, dora, lora-fa"):
            named(wrong)
    with pytest.raises(ConfigError, match="bottleneck_size: expected"):
        named("series:0")


def test_a_method_that_the_model_cannot_have_is_listed_beside_the_others(tmp_path, capsys):
    config(2).save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--sequence", "8", "--methods"]
    assert command([*words, "lora:2", "bitfit", "vera:4"]) == 0
    out, error = capsys.readouterr()
    assert "LoRA r=2" in out
    assert "VeRA r=4" in out
    assert error == "not planned: BitFit trains biases, and LlamaForCausalLM has none\n"
    assert command([*words, "bitfit"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(PatchError, match="has none"):
        fastpeft.plan(config(2), "bitfit", 1, 8)


class Block(nn.Module):
    """One linear after what makes its input, which is alive only if somebody keeps it."""

    def __init__(self, K, N):
        super().__init__()
        self.proj = nn.Linear(K, N)

    def forward(self, z):
        return self.proj(z + 1.0)  # the sum's backward keeps nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lora_fa_keeps_no_input_and_bitfit_nothing(dtype):
    M, K, N, r = 63, 40, 24, 3
    z = torch.randn(M, K, dtype=dtype, requires_grad=True)

    def kept(method):
        torch.manual_seed(0)
        model = nn.ModuleList([Block(K, N), Block(K, N)]).to(dtype)
        fastpeft.patch(model, method)
        return saved.count(lambda: model[0](z), [*saved.state_of(model), z])

    x = M * K * dtype.itemsize
    lora, lora_fa = kept(LoRA(r=r)), kept(LoRA(r=r, freeze_lora_A=True))
    s = M * r * dtype.itemsize
    assert lora_fa == (s, s)
    assert lora == (x + s, x + s)
    assert kept(BitFit()) == (0, 0)


def test_bitfit_of_a_whole_model_keeps_what_a_frozen_model_keeps():
    """A frozen linear keeps no input, so biases above the first attention must not add a byte."""

    def kept(trains):
        model = real_model(attention_bias=True, mlp_bias=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains(name))
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
        return saved.count(lambda: model(input_ids=ids, labels=ids).loss, saved.state_of(model))

    first = tuple(f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv")
    frozen = kept(lambda name: name in first)
    assert kept(lambda name: name.endswith("bias")) == frozen
    with_inputs = kept(lambda name: name in first or name.endswith("down_proj.weight"))
    extra = 3 * BATCH * SEQUENCE * 48 * 4  # the three inputs of down_proj, [batch, sequence, 48] fp32
    assert with_inputs[0] == frozen[0] + extra
    model = real_model(attention_bias=True, mlp_bias=True)
    bitfit = fastpeft.plan(model, BitFit(), BATCH, SEQUENCE).activations
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    assert bitfit == fastpeft.plan(model, None, BATCH, SEQUENCE).activations


def test_topk_keeps_nothing_below_its_lowest_layer_and_each_layer_costs_the_same():
    layers = 5
    plans, steps = {}, {}
    for k in range(1, layers + 1):
        plans[k] = fastpeft.plan(real_model(layers), TopK(layers=k), BATCH, SEQUENCE)
        steps[k] = measured(real_model(layers), TopK(layers=k), active=range(layers - k, layers))
        for place in range(layers):
            block = f"model.layers.{place}"
            for kind in ("activations", "gradients", "optimizer_state"):
                planned = plans[k].layers[block].get(kind, 0)
                real = sum(n for path, n in steps[k].components[kind].items() if path.startswith(block))
                assert planned == real
                assert (real > 0) == (place >= layers - k), (k, block, kind)
    for kind in ("activations", "gradients", "optimizer_state"):
        found = [getattr(plans[k], kind) for k in range(1, layers + 1)]
        differences = {b - a for a, b in itertools.pairwise(found)}
        assert len(differences) == 1, (kind, found)
        assert differences.pop() > 0
    peaks = [plans[k].peak for k in range(1, layers + 1)]
    assert peaks == sorted(set(peaks))
