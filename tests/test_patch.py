"""patch and unpatch on plain models: targets, sharing, freezing, training like PEFT, refusals, undoing."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.layers.adapter import AdapterMixin
from tests.models import gpt2, llama, tokens
from tests.tolerance import relative_error

LLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def last_names(model: nn.Module) -> set[str]:
    return {path.rpartition(".")[2] for path in fastpeft.report(model).patched}


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, bool], list[str]]:
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    return values, flags, [f"{path}: {type(module).__name__}" for path, module in model.named_modules()]


def assert_unchanged(model: nn.Module, before) -> None:
    values, flags, classes = snapshot(model)
    assert values.keys() == before[0].keys()
    assert all(torch.equal(values[name], before[0][name]) for name in values)
    assert (flags, classes) == before[1:]


# --- which modules


def test_default_is_every_linear_of_the_blocks():
    model = fastpeft.patch(llama())
    assert last_names(model) == LLAMA_LINEARS
    assert len(fastpeft.report(model).patched) == 14
    assert not isinstance(model.lm_head, AdapterMixin)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "mlp.up_proj"]}, {"q_proj", "up_proj"}),
        ({"target_modules": r".*layers\.1\..*(k|v)_proj"}, {"k_proj", "v_proj"}),
        ({"target_modules": "all-linear"}, LLAMA_LINEARS),
        ({"exclude_modules": ["down_proj"]}, LLAMA_LINEARS - {"down_proj"}),
        ({"exclude_modules": r".*mlp.*"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"target_modules": ["q_proj", "lm_head"]}, {"q_proj", "lm_head"}),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, {"q_proj"}),
    ],
    ids=["names-suffixes", "regex", "all-linear", "exclude", "exclude-regex", "head", "path"],
)
def test_target_modules(options, expected):
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2, **options))
    assert last_names(model) == expected


def test_layers_to_transform_and_patterns():
    config = fastpeft.LoRA(
        r=4, lora_alpha=8, layers_to_transform=[1], rank_pattern={"q_proj": 2}, alpha_pattern={r"mlp\..*": 4}
    )
    model = fastpeft.patch(llama(), config)
    assert all(".1." in path for path in fastpeft.report(model).patched)
    layer = model.model.layers[1]
    assert layer.self_attn.q_proj.lora_A["default"].shape == (2, 32)
    assert layer.self_attn.q_proj.specs["default"].scaling == 4.0
    assert layer.mlp.up_proj.specs["default"].scaling == 1.0
    rs = fastpeft.patch(llama(), fastpeft.LoRA(r=4, lora_alpha=8, use_rslora=True))
    assert rs.model.layers[0].mlp.up_proj.specs["default"].scaling == 4.0


def test_conv1d_models_are_patched():
    model = fastpeft.patch(gpt2())
    assert last_names(model) == {"c_attn", "c_proj", "c_fc"}
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)


def test_models_without_transformers():
    block = lambda: nn.Sequential(OrderedDict(up=nn.Linear(8, 16), act=nn.ReLU(), down=nn.Linear(16, 8)))  # noqa: E731
    model = nn.Sequential(nn.Linear(3, 8), nn.ModuleList([block(), block()]), nn.Linear(8, 2))
    fastpeft.patch(model)
    assert fastpeft.report(model).patched == ("1.0.up", "1.0.down", "1.1.up", "1.1.down")
    named = nn.Sequential(OrderedDict(first=block(), second=block()))  # the model itself is the stack
    fastpeft.patch(named, fastpeft.LoRA(r=2, layers_to_transform=[1]))
    assert fastpeft.report(named).patched == ("second.up", "second.down")


def test_a_module_at_two_places_gets_one_adapter():
    shared = nn.Linear(8, 8)
    model = nn.ModuleList([nn.ModuleDict({"proj": shared}), nn.ModuleDict({"proj": shared})])
    before = shared
    fastpeft.patch(model, fastpeft.LoRA(r=2, target_modules=["proj"]))
    assert model[0]["proj"] is model[1]["proj"]
    fastpeft.unpatch(model)
    assert model[0]["proj"] is before
    assert model[1]["proj"] is before


# --- sharing, freezing, dtypes, report


def test_base_weights_are_shared_and_frozen():
    model = llama(tied=True)
    weights = dict(model.named_parameters())
    keys = set(model.state_dict())
    fastpeft.patch(model, fastpeft.LoRA(r=2, target_modules=["q_proj", "lm_head"]))
    after = dict(model.named_parameters())
    assert all(after[name] is p and not p.requires_grad for name, p in weights.items())
    assert keys <= set(model.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "tied to model.embed_tokens" in str(fastpeft.report(model))
    trainable = {name for name, p in after.items() if p.requires_grad}
    assert trainable == {name for name in after if "lora_" in name}
    assert len(trainable) == 2 * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_adapters_are_fp32_over_a_16_bit_base(dtype):
    model = fastpeft.patch(llama(dtype), fastpeft.LoRA(r=2, use_dora=True))
    adapters = {p.dtype for p in model.parameters() if p.requires_grad}
    assert adapters == {dtype if dtype is torch.float64 else torch.float32}
    assert model(tokens()).logits.dtype is dtype


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_fresh_patch_changes_no_output_bit(make, use_dora):
    model = make()
    expected = model(tokens()).logits
    fastpeft.patch(model, fastpeft.LoRA(r=4, use_dora=use_dora))
    if use_dora and make is gpt2:  # W and bias are added in two roundings instead of one
        torch.testing.assert_close(model(tokens()).logits, expected)
    else:
        assert torch.equal(model(tokens()).logits, expected)


def test_report_names_every_linear():
    model = fastpeft.patch(
        llama(), fastpeft.LoRA(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    text = str(fastpeft.report(model))
    assert "model.layers.0.self_attn.q_proj: patched, LoRA(r=4, scaling=4)" in text
    assert "model.layers.1.mlp.up_proj: skipped, not targeted" in text
    assert "lm_head: trained, Linear, whole (modules_to_save)" in text
    report = fastpeft.report(model)
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{report.trainable_parameters:,} of" in report.summary()


def test_hooks_of_the_base_module_stay():
    model = llama()
    calls = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    fastpeft.patch(model)
    model(tokens())
    assert calls == [1]
    handle.remove()
    model(tokens())
    assert calls == [1]


# --- training


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no-dropout", "dropout"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients_are_pefts(make, use_dora, dropout, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=use_dora, init_lora_weights=False,
        target_modules="all-linear", lora_dropout=dropout,
    )  # fmt: skip
    theirs = peft.get_peft_model(make(torch.float64), config)
    theirs.save_pretrained(tmp_path)
    ours = fastpeft.load(make(torch.float64), tmp_path)
    if dropout:  # the masks differ, so what must agree is evaluation
        theirs.eval(), ours.eval()
    losses = [model(tokens(), labels=tokens()).loss for model in (theirs, ours)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = {
        name.replace("base_model.model.", "").replace("_A.default.weight", "_A.default")
        .replace("_B.default.weight", "_B.default").replace("vector.default.weight", "vector.default"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }  # fmt: skip
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, gradients[name]) < 1e-9, name


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_lowers_the_loss(use_dora, checkpointing):
    model = fastpeft.patch(
        llama(torch.bfloat16), fastpeft.LoRA(r=8, use_dora=use_dora, lora_dropout=0.05)
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_dora_sees_a_changed_base_weight():
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2, use_dora=True, target_modules=["q_proj"]))
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    # c = m / ||2 W|| halves, the base product doubles
    torch.testing.assert_close(layer(x), before)


def test_modules_to_save_and_biases_train():
    config = fastpeft.LoRA(r=2, target_modules=["c_attn"], bias="all", modules_to_save=["lm_head"])
    model = fastpeft.patch(gpt2(), config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if "lora_" not in name} == {
        name for name, _ in model.named_parameters() if name.endswith("bias") or name == "lm_head.weight"
    }
    assert model.lm_head.weight is not model.transformer.wte.weight
    lora_only = fastpeft.patch(gpt2(), fastpeft.LoRA(r=2, target_modules=["c_attn"], bias="lora_only"))
    biases = {name for name, p in lora_only.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert biases == {f"transformer.h.{i}.attn.c_attn.bias" for i in (0, 1)}
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- undoing, repeating, copying


@pytest.mark.parametrize("make", [llama, gpt2])
def test_unpatch_restores_every_bit(make):
    model = make()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, expected = snapshot(model), model(tokens()).logits
    modules = dict(model.named_modules())
    config = fastpeft.LoRA(
        r=4, use_dora=True, bias="all", modules_to_save=["lm_head"], target_modules="all-linear"
    )
    fastpeft.patch(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert not torch.equal(model(tokens()).logits, expected)
    assert fastpeft.unpatch(model) is model
    assert_unchanged(model, before)
    assert dict(model.named_modules()) == modules
    assert torch.equal(model(tokens()).logits, expected)


def test_unpatch_follows_a_move_and_a_cast():
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2, modules_to_save=["lm_head"]))
    model.to(torch.bfloat16).train()
    fastpeft.unpatch(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())


def test_patch_again():
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2))
    parameters = list(model.parameters())
    assert fastpeft.patch(model, fastpeft.LoRA(r=2)) is model
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    with pytest.raises(fastpeft.PatchError, match=r"already patched with LoRA\(r=2.*or fastpeft.unpatch"):
        fastpeft.patch(model, fastpeft.LoRA(r=4))


def test_copies_are_patched_models_of_their_own():
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2, init_lora_weights=False))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
        fastpeft.unpatch(twin)
        assert not any(isinstance(m, AdapterMixin) for m in twin.modules())
        assert torch.equal(twin(tokens()).logits, llama()(tokens()).logits)
    assert fastpeft.report(model).patched


def test_peft_config_is_accepted_with_pefts_rule_for_names():
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["q_proj", "query_key_value"])
    model = fastpeft.patch(llama(), config)
    assert last_names(model) == {"q_proj"}
    assert fastpeft.report(model).unmatched == ("query_key_value",)
    assert model.model.layers[0].self_attn.q_proj.specs["default"].scaling == 2.0


def test_a_copy_trained_in_fp32_leaves_the_original_as_it_was():
    model = llama(torch.bfloat16)
    before = snapshot(model)
    fastpeft.patch(model, fastpeft.LoRA(r=2, modules_to_save=["lm_head"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fastpeft.unpatch(model)
    assert_unchanged(model, before)


def test_hybrid_stacks_are_blocks_too():
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                [nn.ModuleDict({"proj": nn.Linear(4, 4)}), nn.Sequential(nn.Linear(4, 4), nn.ReLU())]
            ),
            "head": nn.Linear(4, 2),
        }
    )
    fastpeft.patch(model, fastpeft.LoRA(r=2))
    assert fastpeft.report(model).patched == ("layers.0.proj", "layers.1.0")


def test_pefts_own_defaults_hold_for_its_configuration():
    model = fastpeft.patch(llama(), peft.LoraConfig(r=2))
    assert last_names(model) == {"q_proj", "v_proj"}
    for task, heads in (("SEQ_CLS", {"score"}), ("CAUSAL_LM", set())):
        config = LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
            pad_token_id=0,
        )  # fmt: skip
        classifier = fastpeft.patch(LlamaForSequenceClassification(config), peft.LoraConfig(task_type=task))
        trained = {n for n, p in classifier.named_parameters() if p.requires_grad and "lora_" not in n}
        assert {name.partition(".")[0] for name in trained} == heads


# --- refusals: one clear error, nothing changed


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_foreign_linear() -> nn.Module:
    model = llama()
    torch.manual_seed(2)
    model.model.layers[0].mlp.up_proj = Doubled(32, 48, bias=False)
    return model.eval()


def with_hooked_forward() -> nn.Module:
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = layer.forward
    return model


def peft_model() -> nn.Module:
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (llama, {"target_modules": ["q_proj", "gate_prj"]}, "matches 'gate_prj'. Did you mean gate_proj?"),
        (llama, {"target_modules": "nothing.*"}, "no module of the model matches 'nothing.*'"),
        (llama, {"target_modules": ["input_layernorm"]}, "input_layernorm: LlamaRMSNorm cannot be patched"),
        (llama, {"target_modules": ["self_attn"]}, "LlamaAttention cannot be patched"),
        (llama, {"modules_to_save": ["score"]}, "modules_to_save: no module of the model matches score"),
        (llama, {"exclude_modules": ".*"}, "nothing of LlamaForCausalLM is left to patch"),
        (llama, {"layers_to_transform": [7]}, "outside layers_to_transform"),
        (with_hooked_forward, {"target_modules": ["up_proj"]}, "the forward of this Linear was replaced"),
        (peft_model, {}, "PeftModel holds adapters of PEFT's"),
        (lambda: nn.Linear(2, 2), {}, "Linear has no repeated blocks"),
    ],
    ids=[
        "typo", "regex", "norm", "container", "to-save", "all-excluded", "no-layer",
        "replaced-forward", "peft", "no-blocks",
    ],
)  # fmt: skip
def test_refusals_leave_the_model_alone(make, options, said):
    model = make()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError) as error:
        fastpeft.patch(model, fastpeft.LoRA(r=2, **options))
    assert said in str(error.value)
    assert_unchanged(model, before)
    with pytest.raises(fastpeft.PatchError, match="not patched by fastpeft"):
        fastpeft.unpatch(model)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_subclass_keeps_its_own_forward_as_under_peft(use_dora, tmp_path):
    theirs = peft.get_peft_model(
        with_foreign_linear(),
        peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False, use_dora=use_dora),
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = fastpeft.load(with_foreign_linear(), tmp_path)
    torch.testing.assert_close(ours(tokens()).logits, theirs(tokens()).logits)
    assert "LoRADoubled" in repr(ours.model.layers[0].mlp.up_proj)
    twin = pickle.loads(pickle.dumps(ours))
    assert torch.equal(twin(tokens()).logits, ours(tokens()).logits)
    fastpeft.unpatch(ours)
    assert type(ours.model.layers[0].mlp.up_proj) is Doubled


def test_other_wrong_arguments():
    with pytest.raises(fastpeft.PatchError, match=r"expected a torch.nn.Module, got str"):
        fastpeft.patch("model")
    with pytest.raises(fastpeft.ConfigError, match=r"expected fastpeft.LoRA.*, got dict"):
        fastpeft.patch(llama(), {"r": 8})
    with pytest.raises(fastpeft.PatchError, match="without dots"):
        fastpeft.patch(llama(), adapter_name="a.b")
    outer = nn.ModuleDict({"inner": fastpeft.patch(llama())})
    with pytest.raises(fastpeft.PatchError, match="its submodule 'inner' is"):
        fastpeft.unpatch(outer)
    with pytest.raises(fastpeft.PatchError, match="already patched by fastpeft, inside this model"):
        fastpeft.patch(outer)


def test_integer_modules_to_save_are_refused_before_anything_changes():
    model = llama()
    model.extra = nn.Module()
    model.extra.table = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=r"extra.table is torch.int8, expected a floating-point"):
        fastpeft.patch(model, fastpeft.LoRA(r=2, modules_to_save=["extra"]))
    assert_unchanged(model, before)


def test_unpatch_of_a_model_that_lost_parts_changes_nothing():
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2))
    del model.model.norm
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=r"lost parameters.*model.norm.weight"):
        fastpeft.unpatch(model)
    assert_unchanged(model, before)
    assert fastpeft.report(model).patched


def test_dora_dropout_chooses_what_is_dropped():
    """With the adapter at zero, PEFT's dropout still moves the base product of a row whose scale is not 1."""
    outputs = {}
    for meaning in ("base_and_adapter", "adapter"):
        model = nn.Sequential(nn.Linear(8, 4, bias=False))
        config = fastpeft.LoRA(
            r=2, use_dora=True, lora_dropout=0.5, dora_dropout=meaning, target_modules="all-linear"
        )
        fastpeft.patch(model, config).train()
        with torch.no_grad():
            model[0].lora_magnitude_vector["default"].mul_(2)
        x = torch.randn(64, 8)
        outputs[meaning] = torch.equal(model(x), model(x))
    assert outputs == {"base_and_adapter": False, "adapter": True}
