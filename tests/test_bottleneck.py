"""Series and parallel adapters in models: where they are, what they compute, files, and the way back."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft import ParallelAdapter, SeriesAdapter
from fastpeft.layers.bottleneck import CHILD
from fastpeft.methods.bottleneck import bottleneck_adapters
from fastpeft.sparse.suppression import Responses
from tests import architectures
from tests.models import gpt2, llama, tokens
from tests.test_bitfit import bert
from tests.test_patch import assert_unchanged, snapshot

KINDS = [SeriesAdapter, ParallelAdapter]
WHERE = {
    "gpt2": "mlp", "t5": "DenseReluDense", "opt": "fc2", "bloom": "dense_4h_to_h", "bert": "output.dense",
    "roberta": "output.dense", "deberta": "output.dense", "deberta-v2": "output.dense", "whisper": "fc2",
    "mamba": None,
}  # fmt: skip


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def moved(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architecture_has_one_on_each_mlp(name):
    make, inputs = architectures.ARCHITECTURES[name]
    model, where = make(), WHERE.get(name, "mlp")
    before = snapshot(model)
    config = SeriesAdapter(bottleneck_size=6)
    if where is None:
        with pytest.raises(fastpeft.PatchError, match="no MLP was found in the blocks of Mamba"):
            fastpeft.patch(model, config)
        assert_unchanged(model, before)
        return
    with torch.no_grad():
        base = model(**inputs())[0]
    fastpeft.patch(model, config)
    paths = fastpeft.report(model).patched
    sides = 2 if name in ("t5", "clip", "whisper") else 1
    assert len(paths) == sides * architectures.LAYERS
    assert all(path.endswith(where) and "attention" not in path for path in paths)
    with torch.no_grad():
        assert torch.equal(model(**inputs())[0], base), "it starts as its base"
        moved(model)
        assert not torch.equal(model(**inputs())[0], base)
    fastpeft.unpatch(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_computes(kind):
    model = moved(fastpeft.patch(llama(), kind(bottleneck_size=6, non_linearity="gelu", scaling=2.0)))
    mlp, plain = model.model.layers[1].mlp, llama().model.layers[1].mlp
    adapter = mlp.bottleneck_adapter
    x = torch.randn(2, 5, 32)
    y = plain(x)
    z = y if kind is SeriesAdapter else x
    hidden = F.gelu(F.linear(z, adapter.down, adapter.down_bias))
    expected = y + 2.0 * F.linear(hidden, adapter.up, adapter.up_bias)
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(mlp(x=x), expected)
    assert adapter.down.shape == (6, 32)


def test_the_papers_sizes():
    model = fastpeft.patch(llama(), SeriesAdapter())
    assert model.model.layers[0].mlp.bottleneck_adapter.down.shape == (256, 32)
    assert "series, 32 to 256 to 32, tanh" in str(fastpeft.report(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(CHILD in name for name in trained)
    assert fastpeft.report(model).trainable_parameters == 2 * (2 * 32 * 256 + 256 + 32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["self_attn", "mlp"]}, {"0.self_attn", "0.mlp", "1.self_attn", "1.mlp"}),
        ({"target_modules": ["gate_proj"]}, {"0.mlp.gate_proj", "1.mlp.gate_proj"}),
        ({"target_modules": r".*1\.mlp"}, {"1.mlp"}),
        ({"layers_to_transform": [0]}, {"0.mlp"}),
        ({"exclude_modules": ["0.mlp"]}, {"1.mlp"}),
    ],
    ids=["attention", "linear", "regex", "layer", "exclude"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_target_modules(kind, options, expected):
    model = fastpeft.patch(llama(), kind(bottleneck_size=4, **options))
    assert {path.removeprefix("model.layers.") for path in fastpeft.report(model).patched} == expected
    assert torch.equal(logits(model), logits(llama()))
    assert not torch.equal(logits(moved(model)), logits(llama()))
    if expected == {"0.mlp.gate_proj", "1.mlp.gate_proj"}:
        inside = 48 if kind is SeriesAdapter else 32
        assert model.model.layers[0].mlp.gate_proj.bottleneck_adapter.down.shape == (4, inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_files_and_the_way_back(make, kind, dtype, tmp_path):
    model = make(dtype)
    before = snapshot(model)
    fastpeft.patch(model, kind(bottleneck_size=6, non_linearity="silu", modules_to_save=["lm_head"]))
    assert {p.dtype for n, p in model.named_parameters() if CHILD in n} == {torch.float32}
    moved(model)
    fastpeft.save(model, tmp_path)
    again = fastpeft.load(make(dtype), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(make(dtype)))
    fastpeft.load(moved(again), tmp_path)
    assert torch.equal(logits(again), logits(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        fastpeft.unpatch(twin)
        assert torch.equal(logits(twin), logits(make(dtype)))
        assert not list(bottleneck_adapters(twin))
    fastpeft.unpatch(model)
    assert_unchanged(model, before)


def test_disabled_it_is_the_base():
    model = moved(fastpeft.patch(llama(), SeriesAdapter(bottleneck_size=6)))
    adapted = logits(model)
    with fastpeft.disable_adapters(model):
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), adapted)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_suppressed_is_the_base_and_a_share_of_the_rest(kind):
    model = moved(fastpeft.patch(llama(), kind(bottleneck_size=6)))
    plain = llama()
    x = torch.randn(2, 5, 32)
    layers = [model.model.layers[i].mlp for i in range(2)]
    base = [plain.model.layers[i].mlp(x) for i in range(2)]
    whole = [layer(x) for layer in layers]
    with Responses(model, [f"model.layers.{i}" for i in range(2)]).applied() as suppress:
        suppress(frozenset({1}), 0.25)
        found = [layer(x) for layer in layers]
    torch.testing.assert_close(found[0], whole[0])
    torch.testing.assert_close(found[1], base[1] + 0.25 * (whole[1] - base[1]))
    assert torch.equal(layers[1](x), whole[1])


@pytest.mark.parametrize("kind", KINDS)
def test_ist_trains_a_layer_at_a_time(kind):
    torch.manual_seed(0)
    model = fastpeft.patch(llama(), kind(bottleneck_size=16)).train()
    schedule = fastpeft.IST(layers=1, update_every=4)
    optimizer = fastpeft.LayerSparseAdamW(model, 1e-2, schedule=schedule)
    losses, active = [], set()
    for _ in range(16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        with_gradient = {n.split(".")[2] for n, p in model.named_parameters() if p.grad is not None}
        assert len(with_gradient) == 1
        active |= with_gradient
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert active == {"0", "1"}
    assert losses[-1] < losses[0]
    assert any(optimizer.sparse.scores)


def test_gradients_are_those_of_plain_pytorch():
    model = moved(fastpeft.patch(llama(), SeriesAdapter(bottleneck_size=6)))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    plain = llama().requires_grad_(False)
    trained = []
    for layer, block in zip(plain.model.layers, model.model.layers, strict=True):
        ours = block.mlp.bottleneck_adapter
        size = nn.Linear(32, 6), nn.Linear(6, 32)
        for linear, (weight, bias) in zip(
            size, ((ours.down, ours.down_bias), (ours.up, ours.up_bias)), strict=True
        ):
            linear.weight.data, linear.bias.data = weight.detach().clone(), bias.detach().clone()
        layer.mlp.register_forward_hook(lambda _, __, y, s=size: y + s[1](torch.tanh(s[0](y))))
        trained += [(p, getattr(ours, n)) for p, n in zip(
            (size[0].weight, size[0].bias, size[1].weight, size[1].bias),
            ("down", "down_bias", "up", "up_bias"), strict=True,
        )]  # fmt: skip
    plain(input_ids=tokens(), labels=tokens()).loss.backward()
    for theirs, ours in trained:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


class Residual(nn.Module):
    """An attention of no transformer: it returns a list."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return [self.proj(x)]


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (
            llama,
            SeriesAdapter(target_modules=["mpl"]),
            "no module of the model matches 'mpl'; its modules are",
        ),
        (llama, SeriesAdapter(target_modules=["layers"]), "a ModuleList cannot carry an adapter"),
        (llama, SeriesAdapter(target_modules=["norm"]), "expected a linear, or a module inside one of the"),
        (llama, SeriesAdapter(exclude_modules=["mlp"]), "nothing of LlamaForCausalLM is left to adapt"),
        (llama, SeriesAdapter(modules_to_save=["score"]), "no module of the model matches score"),
        (bert, ParallelAdapter(), "no module for the whole MLP"),
        (lambda: nn.Linear(2, 2), SeriesAdapter(), "no MLP was found in the blocks of Linear"),
    ],
    ids=["typo", "list", "outside", "none-left", "to-save", "parallel-bert", "no-blocks"],
)
def test_refusals_leave_the_model_alone(make, config, said):
    model = make()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=said):
        fastpeft.patch(model, config)
    assert_unchanged(model, before)


def test_outputs_that_are_no_tensors_are_refused_when_called():
    model = nn.ModuleList([nn.ModuleDict({"attention": Residual()})])
    fastpeft.patch(model, SeriesAdapter(target_modules=["attention"]))
    with pytest.raises(fastpeft.ShapeError, match="expected Residual to return a tensor or a tuple"):
        model[0]["attention"](torch.randn(2, 8))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size: expected a whole number of at least 1, got 0"),
        ({"non_linearity": "swish"}, "non_linearity: expected 'relu', 'tanh', 'gelu', 'gelu_tanh' or 'silu'"),
        ({"scaling": -1}, "scaling: expected a number above 0, got -1"),
        ({"target_modules": []}, "target_modules: expected at least one name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_values_are_named(kind, options, said):
    with pytest.raises(fastpeft.ConfigError, match=said):
        kind(**options)


def test_folders_that_do_not_fit(tmp_path):
    fastpeft.save(fastpeft.patch(llama(), SeriesAdapter(bottleneck_size=6, scaling=2)), tmp_path)
    other = fastpeft.patch(llama(), SeriesAdapter(bottleneck_size=6))
    with pytest.raises(fastpeft.CheckpointError, match=r"scaling: the model has 1\.0, the folder 2"):
        fastpeft.load(other, tmp_path)
    parallel = fastpeft.patch(llama(), ParallelAdapter(bottleneck_size=6))
    with pytest.raises(fastpeft.CheckpointError, match="is ParallelAdapter, the folder holds SeriesAdapter"):
        fastpeft.load(parallel, tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "bottleneck_size": 7}))
    model = llama()
    before = snapshot(model)
    with pytest.raises(fastpeft.CheckpointError, match="declared 7, got 6"):
        fastpeft.load(model, tmp_path)
    file.write_text(json.dumps({**content, "lora_alpha": 7}))
    with pytest.raises(
        fastpeft.CheckpointError, match="SeriesAdapter: expected its own fields, got lora_alpha"
    ):
        fastpeft.load(model, tmp_path)
    assert_unchanged(model, before)


def test_what_they_have_not():
    model = fastpeft.patch(llama(), SeriesAdapter(bottleneck_size=6))
    with pytest.raises(fastpeft.PatchError, match="patched with SeriesAdapter, whose values have no names"):
        fastpeft.merge(model)
    with pytest.raises(fastpeft.PatchError, match="already patched with SeriesAdapter"):
        fastpeft.patch(model, fastpeft.LoRA())


def test_compiled_blocks_and_checkpointing():
    torch._dynamo.reset()
    model = moved(fastpeft.patch(llama(), ParallelAdapter(bottleneck_size=6))).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for setup in ("checkpointing", "compiled"):
        model.zero_grad()
        if setup == "checkpointing":
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
            for block in model.model.layers:
                block.forward = torch.compile(block.forward, backend="aot_eager")
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        for name, parameter in model.named_parameters():
            if name in expected:
                torch.testing.assert_close(parameter.grad, expected[name], msg=f"{setup}: {name}")
