"""VeRA: PEFT's numbers and files, by the formula, and no more kept than the vectors need."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import fastpeft
from bench.saved import SavedBytes, count, state_of
from fastpeft.layers.vera import scaled_b
from fastpeft.methods.linears import adapter_layers
from fastpeft.ops import remade
from tests.kernels import interpreter
from tests.models import gpt2, llama, tokens
from tests.quantised import torchao_int8
from tests.test_bitfit import moved
from tests.test_patch import assert_unchanged, snapshot
from tests.tolerance import assert_within_rule, relative_error

OPTIONS = {"r": 6, "projection_prng_key": 11}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def pefts(make, **options):
    return peft.get_peft_model(
        make(), peft.VeraConfig(**{"target_modules": "all-linear", **OPTIONS, **options})
    )


def ours(make, **options):
    return fastpeft.patch(make(), fastpeft.VeRA(**{"target_modules": "all-linear", **OPTIONS, **options}))


def same_vectors(model, theirs) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, layer in adapter_layers(model):
            other = theirs.base_model.model.get_submodule(path)
            for kind in ("vera_lambda_b", "vera_lambda_d"):
                value = getattr(layer, kind)["default"]
                value.copy_(torch.randn(value.shape, generator=generator))
                getattr(other, kind)["default"].copy_(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_matrices_outputs_and_gradients_are_pefts(make):
    model, theirs = ours(make), pefts(make)
    pair = next(layer for _, layer in adapter_layers(model)).vera_projections["default"]
    assert torch.equal(pair.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(pair.vera_B, theirs.base_model.vera_B["default"])
    for path, layer in adapter_layers(model):
        other = theirs.base_model.model.get_submodule(path)
        assert torch.equal(layer.vera_lambda_b["default"], other.vera_lambda_b["default"])
        assert torch.equal(layer.vera_lambda_d["default"], other.vera_lambda_d["default"])
        assert layer.vera_projections["default"] is pair
    assert torch.equal(logits(model), logits(make())), "it starts as its base"
    same_vectors(model, theirs)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    for m in (model, theirs):
        m(input_ids=tokens(), labels=tokens()).loss.backward()
    for path, layer in adapter_layers(model):
        other = theirs.base_model.model.get_submodule(path)
        for kind in ("vera_lambda_b", "vera_lambda_d"):
            grad, expected = (getattr(m, kind)["default"].grad for m in (layer, other))
            assert relative_error(grad, expected) < 1e-4, f"{path}.{kind}"


def formula(x, W, bias, A, B, b, d):
    return F.linear(x, W, bias) + b * F.linear(d * F.linear(x, A), B)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_layer_by_the_formula(dtype, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 17)).to(dtype)  # so that both matrices are cut
    fastpeft.patch(model, fastpeft.VeRA(r=5, target_modules="all-linear"))
    layer = model[1]
    with torch.no_grad():
        layer.vera_lambda_b["default"].normal_()
        layer.vera_lambda_d["default"].normal_()
    pair = layer.vera_projections["default"]
    parts = [layer.weight, layer.bias, pair.vera_A[:, :40], pair.vera_B[:17]]
    vectors = [layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]]
    x = torch.randn(3, 13, 40, dtype=dtype)
    dy = torch.randn(3, 13, 17, dtype=dtype)
    results = {}
    for name, kind in (("exact", torch.float64), ("plain", dtype)):
        inputs = [t.detach().to(kind).requires_grad_() for t in (x, *parts, *vectors)]
        y = formula(*inputs)
        y.backward(dy.to(kind))
        results[name] = [y.detach(), inputs[0].grad, *(v.grad for v in inputs[5:])]
    x.requires_grad_()
    with fastpeft.use_backend(backend), interpreter.mended():
        y = layer(x)
        y.backward(dy)
    found = [y.detach(), x.grad, *(v.grad for v in vectors)]
    for what, mine, exact, plain in zip(
        ("y", "dx", "db", "dd"), found, results["exact"], results["plain"], strict=True
    ):
        assert_within_rule(mine, exact, plain, what)


def test_scaled_b_and_its_gradients():
    b, B, d = torch.randn(7).double().requires_grad_(), torch.randn(7, 3).double(), torch.randn(3).double()
    d.requires_grad_()
    assert torch.autograd.gradcheck(lambda b, d: scaled_b(b, B, d), (b, d))
    assert torch.equal(scaled_b(b, B, d), torch.diag(b) @ B @ torch.diag(d))


def test_no_input_and_no_output_is_kept():
    tokens_, r = 4096, 8
    x = torch.randn(tokens_, 64, requires_grad=True)
    model = fastpeft.patch(nn.Sequential(nn.Linear(64, 48)), fastpeft.VeRA(r=r, target_modules="all-linear"))
    S = tokens_ * r * 4
    assert count(lambda: model(x + 1).sum(), [x, *state_of(model)]) == (S, S)
    theirs = peft.tuners.vera.VeraModel(
        nn.Sequential(nn.Linear(64, 48)), peft.VeraConfig(r=r, target_modules=["0"]), "default"
    )
    saved, _ = count(lambda: theirs(x + 1).sum(), [x, *state_of(theirs)])
    assert saved > 5 * S


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_projection": False},
        {"bias": "vera_only", "modules_to_save": ["lm_head"]},
        {"bias": "all", "layers_to_transform": [1]},
        {"target_modules": r".*(q_proj|down_proj|c_fc)"},
    ],
    ids=["all", "key-alone", "only-bias", "all-bias", "regex"],
)
def test_files_go_both_ways(make, options, tmp_path):
    model = moved(ours(make, **options))
    fastpeft.save(model, tmp_path / "ours")
    assert torch.equal(logits(fastpeft.load(make(), tmp_path / "ours")), logits(model))
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(make())).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(fastpeft.load(make(), tmp_path / "theirs")), logits(model))
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    assert ("base_model.vera_A" in stored[0]) == options.get("save_projection", True)


@pytest.mark.filterwarnings("ignore")
def test_other_matrices_come_from_the_file(tmp_path):
    """What PEFT drew with another generator, say."""
    theirs = pefts(llama)
    with torch.no_grad():
        theirs.base_model.vera_A["default"].normal_()
        for _, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(fastpeft.load(llama(), tmp_path)), logits(theirs), rtol=1e-4, atol=1e-3)


def test_lifecycle(tmp_path):
    model = llama()
    before = snapshot(model)
    fastpeft.patch(model, fastpeft.VeRA(r=6, init_weights=False))
    moved(model)
    first = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), first)
        layers = [layer for _, layer in adapter_layers(twin)]
        assert len({id(layer.vera_projections["default"]) for layer in layers}) == 1
    with fastpeft.disable_adapters(model):
        assert torch.equal(logits(model), logits(llama()))
    fastpeft.merge(model)
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-4)
    fastpeft.unmerge(model)
    assert torch.equal(logits(model), first)
    fastpeft.add_adapter(model, "lora", fastpeft.LoRA(r=2, init_lora_weights=False))
    fastpeft.add_adapter(model, "vera", fastpeft.VeRA(r=3, init_weights=False, projection_prng_key=5))
    with fastpeft.mixed_batch(model, ["default", "__base__"]), torch.no_grad():
        mixed = model(tokens()).logits
    torch.testing.assert_close(mixed[0], first[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], logits(llama())[1], rtol=1e-4, atol=1e-4)
    fastpeft.set_adapter(model, ["vera", "lora"])
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"vera", "lora"}
    assert (logits(model) - first).abs().max() > 1e-3
    fastpeft.delete_adapter(model, "vera")
    fastpeft.delete_adapter(model, "lora")
    assert torch.equal(logits(model), first)
    fastpeft.unpatch(model)
    assert_unchanged(model, before)


def test_casting_moves_one_pair():
    model = fastpeft.patch(llama(), fastpeft.VeRA(r=6)).to(torch.bfloat16)
    layers = [layer for _, layer in adapter_layers(model)]
    assert len({layer.vera_projections["default"].vera_A.data_ptr() for layer in layers}) == 1
    assert layers[0].vera_projections["default"].vera_A.dtype is torch.bfloat16
    half = fastpeft.patch(llama(torch.bfloat16), fastpeft.VeRA(r=6))
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert not any("vera_A" in key for key in half.state_dict())


def test_training_compiled_and_a_few_layers_at_a_time():
    torch._dynamo.reset()
    model = fastpeft.patch(llama(), fastpeft.VeRA(r=6, vera_dropout=0.1)).train()
    reference = copy.deepcopy(model).eval()
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
    moved(reference)
    eager = reference(input_ids=tokens(), labels=tokens()).loss
    eager.backward()
    gradients = [p.grad.clone() for p in reference.parameters() if p.grad is not None]
    reference.zero_grad()
    compiled = torch.compile(reference, backend="aot_eager", fullgraph=True)(
        input_ids=tokens(), labels=tokens()
    ).loss
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    for mine, expected in zip(
        (p.grad for p in reference.parameters() if p.requires_grad), gradients, strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r: expected a whole number of at least 1, got 0"),
        ({"projection_prng_key": -1}, "projection_prng_key: expected a whole number of at least 0, got -1"),
        ({"vera_dropout": 1}, r"vera_dropout: expected a number in \[0, 1\), got 1"),
        ({"d_initial": 0}, "d_initial: expected a number above 0, got 0"),
        ({"bias": "lora_only"}, "bias: expected 'none', 'all' or 'vera_only', got 'lora_only'"),
        ({"save_projection": 1}, "save_projection: expected True or False, got 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(options, said):
    with pytest.raises(fastpeft.ConfigError, match=said):
        fastpeft.VeRA(**options)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_changes_nothing(tmp_path):
    model = llama()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match="embed_tokens: VeRA is for linears"):
        fastpeft.patch(model, fastpeft.VeRA(target_modules=["embed_tokens"]))
    fastpeft.save(ours(llama), tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "r": 7}))
    with pytest.raises(fastpeft.CheckpointError, match="declared r=7, got 6 numbers"):
        fastpeft.load(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "layers_pattern": "h"}))
    with pytest.raises(fastpeft.CheckpointError, match="does not honour: layers_pattern"):
        fastpeft.load(model, tmp_path)
    assert_unchanged(model, before)
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    other = ours(llama, r=4)
    with pytest.raises(fastpeft.CheckpointError, match="r: the model has 4, the folder 6"):
        fastpeft.load(other, tmp_path)
    with pytest.raises(fastpeft.CheckpointError, match="hotswap takes a LoRA"):
        fastpeft.hotswap(other, tmp_path)
    with pytest.raises(fastpeft.PatchError, match="default is VeRA; expected LoRA"):
        fastpeft.combine_adapters(other, {"default": 1.0}, "both")


@pytest.mark.filterwarnings("ignore")
def test_pefts_configuration_with_its_default_targets():
    model = fastpeft.patch(llama(), peft.VeraConfig(r=4))
    found = {path.rpartition(".")[2] for path in fastpeft.report(model).patched}
    theirs = peft.get_peft_model(llama(), peft.VeraConfig(r=4))
    expected = {n.rpartition(".")[2] for n, m in theirs.named_modules() if hasattr(m, "vera_lambda_b")}
    assert found == expected


@pytest.mark.parametrize("what", ["blocks", "linears", "added"])
def test_products_are_made_anew_in_every_op_and_change_no_gradient(what, monkeypatch):
    """In blocks, in single linears and on a base's own product; and nothing of them is kept."""
    gradients, saved = [], []
    for is_kept in (False, True):
        if is_kept:
            monkeypatch.setattr(remade, "mark", lambda *_: None)
        model = moved(ours(lambda: torchao_int8(torch.float32) if what == "added" else llama()))
        if what == "linears":  # whose hooks want each to be called
            for _, layer in adapter_layers(model):
                layer.register_forward_hook(lambda *_: None)
        with SavedBytes(state_of(model)) as held:
            loss = model(input_ids=tokens(), labels=tokens()).loss
        saved.append(held.bytes())
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    rows = sum(layer.weight_out_in().shape[0] for _, layer in adapter_layers(model))
    assert saved[1] - saved[0] == rows * OPTIONS["r"] * 4


def test_a_vector_written_between_forward_and_backward_is_an_error():
    model = ours(llama)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    with torch.no_grad():
        next(layer for _, layer in adapter_layers(model)).vera_lambda_d["default"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
