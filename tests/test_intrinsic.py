"""Intrinsic dimension in the verbs: every parameter by the formula, files, lifecycle, training, refusals."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import fastpeft
from bench.saved import count, state_of
from fastpeft import IntrinsicDimension
from fastpeft.ops import subspace_embedding, subspace_linear, subspace_weight
from fastpeft.ops.subspace import add_projected
from tests import architectures
from tests.models import gpt2, llama, tokens
from tests.ops.projections import F64, KINDS, explicit
from tests.test_bitfit import bert
from tests.test_patch import assert_unchanged, snapshot
from tests.tolerance import assert_within_rule


def moved(model, seed=0, by=1.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def in_references(run, monkeypatch):
    """What the formulas give where nothing is saved on."""
    with monkeypatch.context() as patched:
        for op in (subspace_embedding, subspace_linear, subspace_weight):
            patched.setattr(op, "is_transformed", lambda: True)
        return run()


def vit():
    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=4
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def inputs_of(model):
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
    if model.config.is_encoder_decoder:
        return architectures.text_to_text()
    return {"input_ids": tokens()}


MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
    "t5": architectures.ARCHITECTURES["t5"][0],
    "mamba": architectures.ARCHITECTURES["mamba"][0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"projection": "hashed", "structure_aware": True}], ids=["fastfood", "said"]
)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_moves_by_the_formula(name, options, monkeypatch):
    model = MODELS[name]().double()
    base = copy.deepcopy(model)
    fastpeft.patch(model, IntrinsicDimension(d=70, **options))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(model).items()}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)  # theta_d begins at 0
    moved(model, by=2.0)

    def run():
        logits = model(**inputs).logits
        model.zero_grad()
        logits.square().sum().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    logits, gradients = run()
    expected, by_reference = in_references(run, monkeypatch)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    assert set(gradients) == {f"subspace.{n}" for n, _ in model.subspace.named_parameters()}
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, by_reference[key], rtol=1e-8, atol=1e-10)
    # And the reference is W_0 + lambda P theta_d, in a plain model.
    numels = [p.numel() for p in base.parameters()]
    subspace_ = model.subspace
    P = explicit(subspace_.projection, subspace_.tables, numels)
    delta = (P @ subspace_.theta_d.detach()).split(numels)
    scales = {}
    for path, module in base.named_modules():
        for p in module._parameters.values():
            if p is not None and id(p) not in scales:
                scales[id(p)] = path
    paths = list(dict.fromkeys(scales.values()))
    with torch.no_grad():
        for p, change in zip(base.parameters(), delta, strict=True):
            scale = 1.0 if subspace_.lambdas is None else subspace_.lambdas[paths.index(scales[id(p)])]
            p += scale * change.view(p.shape)
        torch.testing.assert_close(base(**inputs).logits, logits, rtol=1e-9, atol=1e-11)
    assert fastpeft.report(model).trainable_parameters == 70


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_plain_pytorchs(kind):
    """In bf16: y and dtheta_d as a linear's whose weight was rounded to bf16."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 80).bfloat16()
    model = fastpeft.patch(nn.Sequential(linear), IntrinsicDimension(d=60, projection=kind))
    moved(model, by=3.0)
    x, dy = torch.randn(64, 96).bfloat16(), torch.randn(64, 80).bfloat16()
    y = model(x)
    y.backward(dy)
    subspace_ = model.subspace
    projection = subspace_.projection
    made = [t.double() if t.is_floating_point() else t for t in subspace_.tables]
    numels = [80 * 96, 80]
    P = explicit(projection, made, numels)
    theta = subspace_.theta_d.detach().double()
    W0, b0 = (model[0]._parameters[n].detach().double() for n in ("weight", "bias"))
    W, b = W0 + (P[:7680] @ theta).view(80, 96), b0 + P[7680:] @ theta
    exact = F.linear(x.double(), W, b)
    plain = F.linear(x, W.bfloat16(), b.bfloat16())
    assert_within_rule(y, exact, plain, "y")
    # The sum is rounded once, and its delta not before.
    operands = subspace_.operands(0, model[0]._parameters["weight"])
    delta = add_projected(projection, torch.zeros(80, 96), operands[0], operands[1], 0, torch.float32)
    assert torch.equal(model[0].weight, (W0.float() + delta).bfloat16())
    dW, db = dy.double().t() @ x.double(), dy.double().sum(0)
    by_hand = P.t() @ torch.cat([(dy.t() @ x).double().flatten(), dy.sum(0).double()])
    assert_within_rule(subspace_.theta_d.grad, P.t() @ torch.cat([dW.flatten(), db]), by_hand, "dtheta_d")


def test_one_layer_is_all_that_lives(monkeypatch):
    """Nothing of a weight's size is kept for backward, and one such tensor lives at a time in it."""
    torch.manual_seed(0)
    sizes = [64, 512, 512, 512, 64]
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers)
    x = torch.randn(4, 64)
    full = count(lambda: model(x).sum(), [x, *state_of(model)])
    fastpeft.patch(model, IntrinsicDimension(d=100))
    kept = count(lambda: model(x).sum(), [x, *state_of(model)])
    assert kept[0] <= full[0] + 4 * 4 * 2 * 128  # phi, for each layer
    alive = []
    real = subspace_linear.projected_gradient

    def watched(*args, **kwargs):
        import gc

        big = {
            t.untyped_storage().data_ptr()
            for t in gc.get_objects()
            if issubclass(type(t), torch.Tensor)
            and t.numel() == 512 * 512
            and not isinstance(t, nn.Parameter)
        }
        base = {p.untyped_storage().data_ptr() for p in model.parameters()}
        alive.append(len(big - base))
        return real(*args, **kwargs)

    monkeypatch.setattr(subspace_linear, "projected_gradient", watched)
    model(x).sum().backward()
    assert max(alive) == 1
    assert len(alive) == 4


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("structure_aware", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_tiny_and_give_the_model_to_the_bit(kind, structure_aware, make, tmp_path):
    config = IntrinsicDimension(d=50, projection=kind, structure_aware=structure_aware, seed=9)
    model = moved(fastpeft.patch(make(), config))
    fastpeft.save(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == 50
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2500
    again = fastpeft.load(make(), tmp_path)
    with torch.no_grad():
        expected = model(tokens()).logits
        assert torch.equal(again(tokens()).logits, expected)
        assert not torch.equal(make()(tokens()).logits, expected)
        fastpeft.load(moved(again, 1), tmp_path)
        assert torch.equal(again(tokens()).logits, expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        f"subspace.{n}" for n, _ in again.subspace.named_parameters()
    }


@pytest.mark.parametrize(
    "make", [llama, lambda: llama(tied=True), gpt2, vit], ids=["llama", "tied", "gpt2", "vit"]
)
def test_lifecycle(make):
    model = make()
    base = model(**inputs_of(model)).logits.detach()
    before = snapshot(model)
    moved(fastpeft.patch(model, IntrinsicDimension(d=60, structure_aware=True)))
    run = lambda m: m(**inputs_of(m)).logits.detach()  # noqa: E731
    expected = run(model)
    with fastpeft.disable_adapters(model):
        assert torch.equal(run(model), base)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), expected)
        moved(twin, 5)
        assert not torch.equal(run(twin), expected)
        assert torch.equal(run(model), expected)
        fastpeft.unpatch(twin)
        assert torch.equal(run(twin), base)
    fastpeft.merge(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=1e-6)
    plain = make()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "subspace" not in k})
    assert torch.equal(run(plain), run(model))
    with pytest.raises(fastpeft.PatchError, match="is merged"):
        fastpeft.merge(model)
    with pytest.raises(fastpeft.PatchError, match="is merged"), fastpeft.disable_adapters(model):
        pass
    fastpeft.unmerge(model)
    assert torch.equal(run(model), expected)
    with pytest.raises(fastpeft.PatchError, match="nothing is merged"):
        fastpeft.unmerge(model)
    fastpeft.merge(model)
    fastpeft.unpatch(model)
    assert_unchanged(model, before)
    assert type(model) is type(make())
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]


def test_a_merge_without_base_cannot_be_undone():
    model = moved(fastpeft.patch(llama(), IntrinsicDimension(d=20)))
    with torch.no_grad():
        expected = model(tokens()).logits
        fastpeft.merge(model, keep_base=False)
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-6)
    for verb in (fastpeft.unmerge, fastpeft.unpatch):
        with pytest.raises(fastpeft.PatchError, match="keep_base=False"):
            verb(model)
    other = moved(fastpeft.patch(llama(), IntrinsicDimension(d=20)))
    before = snapshot(other)
    with torch.no_grad():
        other.subspace.theta_d[3] = math.inf
    with pytest.raises(fastpeft.PatchError, match="is not finite; nothing was merged"):
        fastpeft.merge(other)
    for key, value in before[0].items():
        assert torch.equal(other.state_dict()[key], value) or "theta_d" in key


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, lambda n: n.endswith(("q_proj.weight", "v_proj.weight"))),
        ({"target_modules": "all-linear"}, lambda n: "_proj" in n or "lm_head" in n),
        ({"target_modules": r".*norm"}, lambda n: "norm" in n),
        ({"exclude_modules": ["embed_tokens", "lm_head"]}, lambda n: "embed" not in n and "lm_head" not in n),
        ({"layers_to_transform": [1]}, lambda n: ".layers.1." in n),
        ({"modules_to_save": ["lm_head"]}, lambda n: "lm_head" not in n),
    ],
    ids=["names", "all-linear", "regex", "exclude", "layer", "whole"],
)
def test_which_parameters(options, expected, tmp_path):
    model = fastpeft.patch(llama(), IntrinsicDimension(d=30, **options))
    total = sum(p.numel() for n, p in llama().named_parameters() if expected(n))
    assert model.subspace.projection.total == total
    moved(model)
    fastpeft.save(model, tmp_path)
    again = fastpeft.load(llama(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("way", ["plain", "checkpointing", "compile", "autocast", "bf16"])
def test_training(way):
    torch.manual_seed(0)
    model = llama(torch.bfloat16 if way == "bf16" else torch.float32).train()
    fastpeft.patch(model, IntrinsicDimension(d=60))
    if way == "bf16":
        model.to(torch.bfloat16)  # which must not reach the subspace
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    if way == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if way == "compile" else model
    optimizer = torch.optim.AdamW(trained, lr=0.2, weight_decay=0.0)
    losses = []
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = run(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    if way in ("checkpointing", "compile"):
        plain = fastpeft.patch(llama().train(), IntrinsicDimension(d=60))
        loss = plain(input_ids=tokens(), labels=tokens()).loss
        assert loss.item() == losses[0]


def test_torch_func():
    torch.manual_seed(0)
    model = fastpeft.patch(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double(), IntrinsicDimension(d=7)
    )
    moved(model)
    x = torch.randn(3, 5, dtype=F64)
    values = {n: p.detach() for n, p in model.named_parameters()}

    def loss(theta):
        called = torch.func.functional_call(model, {**values, "subspace.theta_d": theta}, (x,))
        return called.square().sum()

    theta = model.subspace.theta_d
    model(x).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(loss)(theta.detach()), theta.grad)


def test_the_plan_is_the_step():
    from tests.test_plan import BATCH, SEQUENCE, assert_same, config, measured, real_model

    method = IntrinsicDimension(d=40)
    planned = fastpeft.plan(config(), method, BATCH, SEQUENCE, dtype=torch.float32, device="cpu")
    assert_same(planned, measured(real_model(), method))
    assert planned.gradients == 4 * 40
    assert "IntrinsicDimension d=40" in str(planned)
    on_gpu = fastpeft.plan(config(), method, BATCH, SEQUENCE, dtype=torch.bfloat16, device="cuda")
    full = fastpeft.plan(config(), "full", BATCH, SEQUENCE, dtype=torch.bfloat16, device="cuda")
    assert on_gpu.gradients + on_gpu.optimizer_state < 1000 < full.gradients


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (llama, {"d": 5, "structure_aware": True}, r"more than the 21 scales .*, got 5"),
        (
            llama,
            {"d": 5, "target_modules": ["q_prj"]},
            "no module with parameters matches 'q_prj'; .*lm_head",
        ),
        (llama, {"d": 5, "exclude_modules": ".*"}, "no parameter of LlamaForCausalLM is left"),
        (llama, {"d": 5, "layout": "1:1:abc"}, r"layout: P is of 1:1:abc, the model has \d+:21:"),
        (lambda: nn.Sequential(nn.LSTM(3, 3)), {"d": 5}, "no parameter of Sequential is left"),
        (llama, {"d": 5, "modules_to_save": ["score"]}, "no module of the model matches score"),
    ],
    ids=["scales", "typo", "all-excluded", "layout", "rnn", "to-save"],
)
def test_refusals_leave_the_model_alone(make, options, said):
    model = make()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=said):
        fastpeft.patch(model, IntrinsicDimension(**options))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"d": 0}, "d: expected a whole number of at least 1, got 0"),
        ({"d": 2.0}, "d: expected a whole number"),
        ({"d": 1, "projection": "dense"}, "projection: expected 'fastfood' or 'hashed', got 'dense'"),
        ({"d": 1, "seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"d": 1, "structure_aware": 1}, "structure_aware: expected True or False, got 1"),
        ({"d": 1, "target_modules": 3}, "target_modules: expected a list of module names, got 3"),
    ],
)
def test_bad_values_are_named(options, said):
    with pytest.raises(fastpeft.ConfigError, match=said):
        IntrinsicDimension(**options)


def test_folders_that_do_not_fit_change_nothing(tmp_path):
    config = IntrinsicDimension(d=30, structure_aware=True)
    fastpeft.save(fastpeft.patch(llama(), config), tmp_path)
    for model, said in (
        (gpt2(), r"layout: P is of"),
        (fastpeft.patch(llama(), IntrinsicDimension(d=31)), "d: the model has 31, the folder 30"),
        (fastpeft.patch(llama(), IntrinsicDimension(d=30, seed=1)), "seed: the model has 1, the folder 0"),
        (
            fastpeft.patch(llama(), IntrinsicDimension(d=30, projection="hashed")),
            "projection: the model has 'hashed'",
        ),
        (fastpeft.patch(gpt2(), fastpeft.BitFit()), "is BitFit, the folder holds IntrinsicDimension"),
    ):
        before = snapshot(model)
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.load(model, tmp_path)
        assert_unchanged(model, before)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for change, said in (
        ({"d": 29}, "declares d=29, .* holds 30 numbers"),
        ({"structure_aware": False}, "expected theta_d alone"),
        ({"projection": "dense"}, "expected 'fastfood' or 'hashed'"),
        ({"r": 3}, "expected its own fields, got r"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.load(llama(), tmp_path)


def test_what_it_has_not():
    model = fastpeft.patch(llama(), IntrinsicDimension(d=10))
    with pytest.raises(fastpeft.PatchError, match="whose values have no names"):
        fastpeft.add_adapter(model, "other")
    with pytest.raises(fastpeft.PatchError, match="has no name, expected None, got 'default'"):
        fastpeft.merge(model, "default")
    with pytest.raises(fastpeft.ShapeError, match=r"expected x \[..., 32\].*got \[2, 5\]"):
        model.model.layers[0].self_attn.q_proj(torch.ones(2, 5))
    with pytest.raises(fastpeft.ShapeError, match="expected x in the weight's dtype"):
        model.model.layers[0].self_attn.q_proj(torch.ones(2, 32, dtype=F64))
