"""AdaLoRA: PEFT's numbers, gradients and files, by the formula, with the regulariser in the loss."""

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
from bench.saved import count, state_of
from fastpeft.layers.adalora import KINDS, hooks_of
from fastpeft.methods.linears import adapter_layers
from fastpeft.ops.orthogonality import orthogonality, orthogonality_reference
from tests.kernels import interpreter
from tests.models import gpt2, llama, tokens
from tests.test_bitfit import moved
from tests.test_patch import assert_unchanged, snapshot
from tests.tolerance import assert_within_rule, relative_error

OPTIONS = {"init_r": 6, "target_r": 2, "total_step": 30, "lora_alpha": 16}
# One layer has none left, one all, and one two that are not its first.
KEPT = [[False] * 6, [True] * 6, [False, True, False, False, True, False]]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def pefts(make, **options):
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **OPTIONS, **options}
    return peft.get_peft_model(make(), peft.AdaLoraConfig(**options))


def ours(make, **options):
    return fastpeft.patch(make(), fastpeft.AdaLoRA(**{"target_modules": "all-linear", **OPTIONS, **options}))


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def same_values(model, theirs, std=0.3) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, layer in adapter_layers(model):
            other = theirs.base_model.model.get_submodule(path)
            for kind in KINDS:
                value = getattr(layer, kind)["default"]
                value.copy_(std * torch.randn(value.shape, generator=generator))
                getattr(other, kind)["default"].copy_(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_outputs_loss_and_gradients_are_pefts(make):
    model, theirs = without_dropout(ours(make)), without_dropout(pefts(make))
    assert torch.equal(logits(model), logits(make())), "it starts as its base"
    same_values(model, theirs)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)
    losses = [m.train()(input_ids=tokens(), labels=tokens()).loss for m in (model, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for path, layer in adapter_layers(model):
        other = theirs.base_model.model.get_submodule(path)
        for kind in KINDS:
            grad, expected = (getattr(m, kind)["default"].grad for m in (layer, other))
            assert relative_error(grad, expected) < 1e-4, f"{path}.{kind}"


def formula(x, W, bias, A, E, B, scaling):
    return F.linear(x, W, bias) + scaling * (x @ (A * E).T @ B.T)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_layer_by_the_formula(dtype, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 17)).to(dtype)
    options = {"init_lora_weights": False, "target_modules": "all-linear"}
    fastpeft.patch(model, fastpeft.AdaLoRA(**OPTIONS, **options))
    layer = model[0]
    numbers = [getattr(layer, kind)["default"] for kind in KINDS]
    assert [list(t.shape) for t in numbers] == [[6, 40], [6, 1], [17, 6]]
    assert {t.dtype for t in numbers} == {torch.float32}
    x = torch.randn(3, 13, 40, dtype=dtype)
    dy = torch.randn(3, 13, 17, dtype=dtype)
    results = {}
    for name, kind in (("exact", torch.float64), ("plain", dtype)):
        inputs = [t.detach().to(kind).requires_grad_() for t in (x, layer.weight, layer.bias, *numbers)]
        y = formula(*inputs, 16 / (6 + 1e-5))
        y.backward(dy.to(kind))
        results[name] = [y.detach(), inputs[0].grad, *(t.grad for t in inputs[3:])]
    x.requires_grad_()
    with fastpeft.use_backend(backend), interpreter.mended():
        y = layer(x)
        y.backward(dy)
    found = [y.detach(), x.grad, *(t.grad for t in numbers)]
    for what, mine, exact, plain in zip(
        ("y", "dx", "dA", "dE", "dB"), found, results["exact"], results["plain"], strict=True
    ):
        assert_within_rule(mine, exact, plain, what)


def test_the_layers_gradients():
    torch.manual_seed(0)
    options = {"init_r": 3, "target_r": 1, "total_step": 9, "init_lora_weights": False}
    config = fastpeft.AdaLoRA(target_modules="all-linear", **options)
    layer = fastpeft.patch(nn.Sequential(nn.Linear(5, 4)).double(), config)[0]
    held = [getattr(layer, kind) for kind in KINDS]

    def call(x, *values):
        for holder, value in zip(held, values, strict=True):
            holder._parameters["default"] = value
        return layer(x)

    values = [holder["default"].detach().clone().requires_grad_() for holder in held]
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *values))


def test_the_regulariser_and_its_gradients():
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64))
    matrices = [torch.randn(4, 9), torch.randn(7, 4).t(), torch.randn(2, 5), torch.zeros(0, 6)]
    matrices = [m.double().requires_grad_() for m in matrices]
    assert torch.autograd.gradcheck(lambda *m: orthogonality(m), matrices[:3])
    torch.testing.assert_close(orthogonality(matrices), orthogonality_reference(matrices))
    assert orthogonality([Q.t()]) < 1e-12
    exact = torch.eye(3, 9).requires_grad_()
    orthogonality([exact, matrices[0]]).backward()
    assert torch.equal(exact.grad, torch.zeros(3, 9)), "the subgradient that torch takes"
    single = [m.detach().float().requires_grad_() for m in matrices]
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonality(single)
        found.backward()
    torch.testing.assert_close(found.double(), orthogonality(matrices), rtol=1e-6, atol=0)
    functional = torch.func.grad(lambda m: orthogonality([m]))(matrices[0].detach())
    (expected,) = torch.autograd.grad(orthogonality(matrices[:1]), matrices[0])
    torch.testing.assert_close(functional, expected)


def test_the_regulariser_is_in_the_loss_of_a_model_in_training():
    model = moved(ours(llama, orth_reg_weight=0.25))
    batch = {"input_ids": tokens(), "labels": tokens()}
    plain = model.eval()(**batch).loss
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).loss, plain)
    regularizer = fastpeft.orthogonal_regularization(model)
    assert regularizer > 0.1
    torch.testing.assert_close(model(**batch).loss, plain + 0.25 * regularizer)
    assert torch.equal(model(**batch)["loss"], model(**batch).loss)
    output = model(**batch, return_dict=False)
    torch.testing.assert_close(output[0], plain)  # a tuple has no loss by name
    with fastpeft.disable_adapters(model):
        torch.testing.assert_close(model(**batch).loss, llama()(**batch).loss)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks_of(twin)[0].layers[0] is next(layer for _, layer in adapter_layers(twin))
        fastpeft.unpatch(twin)
        assert not hooks_of(twin)
    assert len(hooks_of(model)) == 1
    without = moved(ours(llama, orth_reg_weight=0.0))
    torch.testing.assert_close(without.train()(**batch).loss, plain)


def test_little_is_kept():
    rows, r = 4096, 6
    x = torch.randn(rows, 64, requires_grad=True)
    config = fastpeft.AdaLoRA(**OPTIONS, target_modules="all-linear")
    model = fastpeft.patch(nn.Sequential(nn.Linear(64, 48)), config)
    S, product = rows * r * 4, 64 * r * 4
    saved, _ = count(lambda: model(x).sum(), [x, *state_of(model)])
    assert saved == S + product
    theirs = pefts_linear()
    theirs_saved, _ = count(lambda: theirs(x).sum(), [x, *state_of(theirs)])
    assert theirs_saved > saved


def pefts_linear():
    config = peft.AdaLoraConfig(**OPTIONS, target_modules=["0"])
    return peft.tuners.adalora.AdaLoraModel(nn.Sequential(nn.Linear(64, 48)), config, "default")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": "lora_only", "modules_to_save": ["lm_head"]},
        {"bias": "all", "layers_to_transform": [1]},
        {"target_modules": r".*(q_proj|down_proj|c_fc)"},
    ],
    ids=["all", "only-bias", "all-bias", "regex"],
)
def test_files_go_both_ways(make, options, is_pruned, tmp_path):
    model = moved(ours(make, **options))
    if is_pruned:
        prune(model)
    fastpeft.save(model, tmp_path / "ours")
    again = fastpeft.load(make(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(make())).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(fastpeft.load(make(), tmp_path / "theirs")), logits(again))
    fastpeft.save(again, tmp_path / "again")
    names = ("ours", "theirs", "again")
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in names]
    written = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in names]
    for tensors, content in zip(stored[1:], written[1:], strict=True):
        assert tensors.keys() == stored[0].keys()
        assert all(torch.equal(tensors[key], stored[0][key]) for key in tensors)
        assert content["rank_pattern"] == written[0]["rank_pattern"]
    assert bool(written[0]["rank_pattern"]) == is_pruned


def prune(model) -> None:
    """As an allocation leaves it: a pattern, and E zero where it says so."""
    layers = dict(adapter_layers(model))
    ranks = next(iter(layers.values())).specs["default"].ranks
    for place, (path, layer) in enumerate(layers.items()):
        kept = KEPT[place % 3]
        ranks.pattern[path] = tuple(kept)
        with torch.no_grad():
            layer.lora_E["default"].mul_(torch.tensor(kept)[:, None])


@pytest.mark.filterwarnings("ignore")
def test_a_pruned_adapter_is_small_and_trains_on(tmp_path):
    model = moved(ours(llama))
    prune(model)
    fastpeft.save(model, tmp_path)
    small = fastpeft.load(llama(), tmp_path)
    ranks = [layer.lora_A["default"].shape[0] for _, layer in adapter_layers(small)]
    assert set(ranks) == {0, 2, 6}
    assert "AdaLoRA(r=2 of 6, scaling=2.66666)" in str(fastpeft.report(small))
    assert all(p.numel() for p in small.parameters() if p.requires_grad), "nothing empty trains"
    before = small.train()(input_ids=tokens(), labels=tokens()).loss
    before.backward()
    optimizer = torch.optim.AdamW([p for p in small.parameters() if p.requires_grad], 1e-2)
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)
    optimizer.step()
    assert small(input_ids=tokens(), labels=tokens()).loss < before
    with pytest.raises(fastpeft.PatchError, match="the ranks of 'default' are final"):
        fastpeft.RankAllocator(small, optimizer)
    fastpeft.merge(small)
    fastpeft.unmerge(small)
    fastpeft.save(small, tmp_path / "again")
    again = fastpeft.load(llama(), tmp_path / "again")
    assert torch.equal(logits(again), logits(small))


def test_lifecycle():
    model = llama()
    before = snapshot(model)
    fastpeft.patch(model, fastpeft.AdaLoRA(**OPTIONS, init_lora_weights=False))
    moved(model)
    first = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), first)
        specs = [layer.specs["default"] for _, layer in adapter_layers(twin)]
        assert len({id(spec.ranks) for spec in specs}) == 1
        assert specs[0].ranks is not next(iter(adapter_layers(model)))[1].specs["default"].ranks
    with fastpeft.disable_adapters(model):
        assert torch.equal(logits(model), logits(llama()))
    fastpeft.merge(model)
    torch.testing.assert_close(logits(model), first, rtol=1e-4, atol=1e-4)
    fastpeft.unmerge(model)
    assert torch.equal(logits(model), first)
    fastpeft.add_adapter(model, "lora", fastpeft.LoRA(r=2, init_lora_weights=False))
    fastpeft.add_adapter(model, "other", fastpeft.AdaLoRA(**OPTIONS, init_lora_weights=False))
    assert [hook.name for hook in hooks_of(model)] == ["default", "other"]
    with pytest.raises(fastpeft.PatchError, match="expected a model with one AdaLoRA adapter"):
        fastpeft.orthogonal_regularization(model)
    with pytest.raises(fastpeft.PatchError, match="expected a model with an AdaLoRA adapter 'lora'"):
        fastpeft.RankAllocator(model, adapter_name="lora")
    with fastpeft.mixed_batch(model, ["default", "__base__"]), torch.no_grad():
        mixed = model(tokens()).logits
    torch.testing.assert_close(mixed[0], first[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], logits(llama())[1], rtol=1e-4, atol=1e-4)
    fastpeft.set_adapter(model, ["other", "lora"])
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other", "lora"}
    assert (logits(model) - first).abs().max() > 1e-3
    fastpeft.delete_adapter(model, "other")
    fastpeft.delete_adapter(model, "lora")
    assert torch.equal(logits(model), first)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    fastpeft.unpatch(model)
    assert not model._forward_hooks
    for parameter in model.parameters():
        parameter.grad = None
    assert_unchanged(model.eval(), before)


@pytest.mark.filterwarnings("ignore")
def test_compiled_with_the_regulariser():
    torch._dynamo.reset()
    model = moved(ours(llama, lora_dropout=0.1)).train()
    for layer in (layer for _, layer in adapter_layers(model)):
        layer.lora_dropout["default"].p = 0.0
    eager = model(input_ids=tokens(), labels=tokens()).loss
    eager.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    torch.testing.assert_close(loss, eager)
    for mine, expected in zip(
        (p.grad for p in model.parameters() if p.requires_grad), gradients, strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_r": 0}, "init_r: expected a whole number of at least 1, got 0"),
        ({"target_r": 7}, "target_r: expected at most init_r=6, the rank at first, got 7"),
        ({"total_step": None}, "total_step: expected a whole number of at least 1, got None"),
        ({"tinit": 20, "tfinal": 10}, r"tinit \+ tfinal: .* got 20 \+ 10 of 30"),
        ({"tinit": -1}, "tinit: expected a whole number of at least 0, got -1"),
        ({"deltaT": 0}, "deltaT: expected a whole number of at least 1, got 0"),
        ({"beta1": 1.0}, r"beta1: expected a number in \[0, 1\), got 1.0"),
        ({"beta2": 0.0}, "beta2: expected a number above 0, got 0.0"),
        ({"orth_reg_weight": -0.5}, "orth_reg_weight: expected a number of at least 0, got -0.5"),
        ({"lora_alpha": 0}, "lora_alpha: expected a number above 0, got 0"),
        ({"bias": "vera_only"}, "bias: expected 'none', 'all' or 'lora_only', got 'vera_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True or False, got 'pissa'"),
        ({"rank_pattern": {"a": [True] * 6}}, "rank_pattern: expected keys 'path.lora_E', got 'a'"),
        ({"rank_pattern": {"a.lora_E": [True]}}, r"init_r=6 times True or False, got 1 values"),
        ({"rank_pattern": {"a.lora_E": [2] * 6}}, r"times True or False, got \[2, 2, 2, 2, 2, 2\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(options, said):
    with pytest.raises(fastpeft.ConfigError, match=said):
        fastpeft.AdaLoRA(**{**OPTIONS, **options})


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_changes_nothing(tmp_path):
    model = llama()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match="embed_tokens: AdaLoRA is for linears"):
        fastpeft.patch(model, fastpeft.AdaLoRA(**OPTIONS, target_modules=["embed_tokens"]))
    pattern = {"model.layers.9.q_proj.lora_E": KEPT[1]}
    with pytest.raises(fastpeft.PatchError, match="rank_pattern: expected modules that get an adapter"):
        fastpeft.patch(model, fastpeft.AdaLoRA(**OPTIONS, rank_pattern=pattern))
    with pytest.raises(fastpeft.ConfigError, match="does not honour: alpha_pattern, use_rslora"):
        fastpeft.patch(model, peft.AdaLoraConfig(total_step=9, use_rslora=True, alpha_pattern={"q_proj": 2}))
    pruned = moved(ours(llama))
    prune(pruned)
    fastpeft.save(pruned, tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    first, *_ = content["rank_pattern"]
    path = first.removesuffix(".lora_E")
    for change, said in (
        ({"rank_pattern": None}, f"{path}: declared r=6, the file's lora_E has 0 rows"),
        ({"rank_pattern": {**content["rank_pattern"], first: KEPT[2]}}, "declared r=2, .* has 0 rows"),
        ({"rank_pattern": {**content["rank_pattern"], "x.lora_E": KEPT[2]}}, "x.lora_E: in rank_pattern"),
        ({"rank_pattern": {first: [True]}}, "expected init_r=6 times True or False, got 1 values"),
        ({"init_r": 5}, "expected init_r=5 times True or False, got 6 values"),
        ({"use_dora": True}, "does not honour: use_dora"),
        ({"total_step": 0}, "total_step: expected a whole number of at least 1, got 0"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.load(model, tmp_path)
    file.write_text(json.dumps(content))
    assert not model._forward_hooks
    assert_unchanged(model, before)
    other = ours(llama)
    with pytest.raises(
        fastpeft.CheckpointError, match=r"the model has r=6, .*; the folder has r=0, init_r=6"
    ):
        fastpeft.load(other, tmp_path)
    with pytest.raises(fastpeft.CheckpointError, match="hotswap takes a LoRA"):
        fastpeft.hotswap(other, tmp_path)
    with pytest.raises(fastpeft.PatchError, match="default is AdaLoRA; expected LoRA"):
        fastpeft.combine_adapters(other, {"default": 1.0}, "both")


@pytest.mark.filterwarnings("ignore")
def test_pefts_configuration_with_its_default_targets():
    model = fastpeft.patch(llama(), peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9))
    found = {path.rpartition(".")[2] for path in fastpeft.report(model).patched}
    theirs = peft.get_peft_model(llama(), peft.AdaLoraConfig(total_step=9))
    expected = {n.rpartition(".")[2] for n, m in theirs.named_modules() if hasattr(m, "lora_E")}
    assert found == expected


@pytest.mark.filterwarnings("ignore")
def test_a_plan():
    config = llama().config
    found = fastpeft.plan(config, fastpeft.AdaLoRA(**OPTIONS), 1, 32, device="cpu")
    model = fastpeft.patch(llama(), fastpeft.AdaLoRA(**OPTIONS))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert found.gradients == trained
    # Two moments, with a step each, and two scores.
    steps = 4 * sum(1 for p in model.parameters() if p.requires_grad)
    assert found.optimizer_state == 4 * trained + steps
    assert found.setting.method == "AdaLoRA init_r=6"
    assert found.setting.rank == 6
    theirs = peft.AdaLoraConfig(**OPTIONS, target_modules=["q_proj", "v_proj"])
    assert fastpeft.plan(config, theirs, 1, 32, device="cpu", rank=9).setting.rank == 9
    both = fastpeft.plan(config, (fastpeft.AdaLoRA(**OPTIONS), fastpeft.IST(layers=1)), 1, 32, device="cpu")
    assert both.gradients < trained
