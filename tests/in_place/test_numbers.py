"""A PEFT model accelerated in place computes what PEFT computes: outputs and gradients, by the 2x rule."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

import fastpeft
from tests.in_place.cases import assert_same_as_peft, peft_model, with_adapters
from tests.models import gpt2, llama, tokens

EMBEDDINGS = ["embed_tokens", "q_proj", "up_proj"]


def both(model):
    """The model accelerated, and an untouched copy."""
    untouched = copy.deepcopy(model)
    return fastpeft.patch(model), untouched


def calls(model) -> set[str]:
    return {route for route, count in fastpeft.report(model).calls.items() if count}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True, "target_modules": ["down_proj"]},
        {"target_modules": ["lm_head", "k_proj"]},
    ],
    ids=lambda options: ",".join(options) or "lora",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_like_peft(options, dtype):
    patched, untouched = both(peft_model(dtype, **options))
    assert_same_as_peft(patched, untouched)
    assert calls(patched) == {"fused"}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}], ids=str)
def test_conv1d_with_biases(options):
    patched, untouched = both(peft_model(base=gpt2, **options))
    assert_same_as_peft(patched, untouched)
    assert calls(patched) == {"fused"}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_in_16_bits(use_dora):
    model = with_adapters(llama(torch.bfloat16), [{"use_dora": use_dora}], autocast_adapter_dtype=False)
    patched, untouched = both(model)
    assert_same_as_peft(patched, untouched)
    assert calls(patched) == {"fused"}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings(use_dora, dtype):
    model = peft_model(dtype, target_modules=EMBEDDINGS, use_dora=use_dora)
    patched, untouched = both(model)
    assert_same_as_peft(patched, untouched)
    assert calls(patched) == {"fused", "added"}


SEVERAL = {
    "lora-lora": [{}, {"r": 2, "lora_alpha": 5}],
    "lora-dora": [{}, {"use_dora": True}],
    "dora-lora": [{"use_dora": True}, {}],
    "dora-dora": [{"use_dora": True}, {"r": 3, "use_dora": True}],
    "other-targets": [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["v_proj", "q_proj"]},
    ],
    "embedding-dora": [{"target_modules": EMBEDDINGS, "use_dora": True}, {"target_modules": EMBEDDINGS}],
}


@pytest.mark.parametrize("configs", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("base", [llama, gpt2])
def test_several_active_adapters(configs, base):
    if base is gpt2 and any("target_modules" in options for options in configs):
        pytest.skip("llama's names")
    patched, untouched = both(with_adapters(base(), configs))
    assert_same_as_peft(patched, untouched)
    assert "peft" not in calls(patched)


def test_several_adapters_with_dropout_draw_one_mask_each():
    """With B's columns all equal, a shared mask would make the two updates proportional."""
    model = with_adapters(llama(), [{"lora_dropout": 0.5}, {"lora_dropout": 0.5}])
    layer = fastpeft.patch(model).base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["other"].weight.copy_(-layer.lora_A["default"].weight)
        layer.lora_B["other"].weight.copy_(layer.lora_B["default"].weight)
    x = torch.randn(5, 32)
    layer.train()
    assert not torch.allclose(layer(x), layer.base_layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "added"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_mean_of_dropout_is_the_layer_without(use_dora, hooked):
    model = peft_model(use_dora=use_dora, lora_dropout=0.3)
    layer = fastpeft.patch(model).base_model.model.model.layers[0].self_attn.q_proj
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(1, 32)
    expected = layer(x)
    layer.train()
    samples = layer(x.expand(20_000, 32)).detach()
    deviation = samples.std(0) / 20_000**0.5
    assert ((samples.mean(0) - expected).abs() < 5 * deviation + 1e-6).all()


def test_scaling_in_a_tensor_stays_one():
    model = peft_model()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"], torch.Tensor)
    patched, untouched = both(model)
    assert_same_as_peft(patched, untouched)
    assert calls(patched) == {"fused"}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_autocast(use_dora):
    """In autocast PEFT multiplies in bf16; so the yardstick is its own error there."""
    patched, untouched = both(peft_model(use_dora=use_dora))
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = patched(tokens()).logits, untouched(tokens()).logits
    exact = copy.deepcopy(untouched).double()(tokens()).logits
    assert ours.dtype == plain.dtype
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()
    assert calls(patched) == {"fused"}


def test_a_base_that_trains_keeps_autograds_product():
    model = peft_model()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    patched, untouched = both(model)
    assert_same_as_peft(patched, untouched)
    assert calls(patched) == {"added"}


def test_hooks_on_the_base_see_its_product():
    model = fastpeft.patch(peft_model())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    seen = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.randn(3, 32)
    y = layer(x)
    torch.testing.assert_close(seen[0], layer.base_layer.forward(x))
    assert not torch.allclose(seen[0], y)
    assert calls(model) == {"added"}


def test_training_steps_like_peft():
    patched, untouched = both(peft_model(use_dora=True))
    losses = []
    for model in (patched, untouched):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_compiles_without_a_graph_break(options):
    model = fastpeft.patch(peft_model(**options)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    if "lora_dropout" not in options:
        eager = model(input_ids=tokens(), labels=tokens()).loss
        torch.testing.assert_close(loss, eager)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_a_compiled_training_step_is_compiled_once(in_place, options):
    """Whatever the accumulation, and though the optimiser changes what DoRA's norm is of."""
    if in_place:
        model = fastpeft.patch(peft_model(**options)).train()
    else:
        model = fastpeft.patch(llama(), fastpeft.LoRA(r=2, **options)).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    compiled(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for accumulation in (1, 3):
            optimizer.step()
            optimizer.zero_grad()
            for _ in range(accumulation):
                compiled(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()


@pytest.mark.parametrize("kind", ["embedding", "trained-base"])
def test_dora_over_another_product_compiles_without_a_graph_break(kind):
    """Its row scale is traced there, whose values nothing may depend on."""
    model = fastpeft.patch(peft_model(use_dora=True, target_modules=EMBEDDINGS)).train()
    if kind == "trained-base":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    torch.testing.assert_close(loss, model(input_ids=tokens(), labels=tokens()).loss)
    assert calls(model) == ({"added"} if kind == "trained-base" else {"added", "fused"})
