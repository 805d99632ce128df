"""Whatever PEFT can do to a model, it does to an accelerated one, with the same results and files."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

import fastpeft
from fastpeft.in_place.install import is_accelerated, tuner_layers
from tests.in_place.cases import logits, lora_config, pair, peft_model
from tests.models import gpt2, llama, tokens


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on Conv1D and on merging with disabled adapters
        yield


def scale(model, factor):
    for _, layer in tuner_layers(model):
        layer.scale_layer(factor)


STEPS = {
    "set": lambda m: m.set_adapter("other"),
    "set-both": lambda m: m.base_model.set_adapter(["default", "other"]),
    "add": lambda m: (torch.manual_seed(5), m.add_adapter("third", lora_config(r=2)), m.set_adapter("third")),
    "add-other-targets": lambda m: (
        torch.manual_seed(5),
        m.add_adapter("third", lora_config(r=2, target_modules=["lm_head"])),
        m.set_adapter("third"),
    ),
    "delete": lambda m: m.delete_adapter("default"),
    "disable-layers": lambda m: m.base_model.disable_adapter_layers(),
    "disable-and-enable": lambda m: (
        m.base_model.disable_adapter_layers(),
        m.base_model.enable_adapter_layers(),
    ),
    "merge": lambda m: m.merge_adapter(),
    "safe-merge-both": lambda m: m.merge_adapter(["default", "other"], safe_merge=True),
    "unmerge": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
    "merge-then-disable": lambda m: (m.merge_adapter(), m.base_model.disable_adapter_layers()),
    "scale": lambda m: scale(m, 0.3),
    "weighted": lambda m: (
        m.add_weighted_adapter(["default", "other"], [0.7, -0.2], "mix", combination_type="linear"),
        m.set_adapter("mix"),
    ),
    "weighted-svd": lambda m: (
        m.add_weighted_adapter(["default", "other"], [0.7, 0.2], "mix", combination_type="svd"),
        m.set_adapter("mix"),
    ),
    "weighted-cat": lambda m: (
        m.add_weighted_adapter(["default", "other"], [0.7, 0.2], "mix", combination_type="cat"),
        m.set_adapter("mix"),
    ),
    "train-mode": lambda m: m.train(),
    "double": lambda m: m.double(),
    "gradients-off": lambda m: m.requires_grad_(False),
}
PLAIN_ONLY = {"weighted", "weighted-svd", "weighted-cat"}  # PEFT refuses them for DoRA


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("step", STEPS)
def test_same_after(step, method):
    if method == "dora" and step in PLAIN_ONLY:
        pytest.skip("PEFT has it for LoRA alone")
    patched, untouched = pair(use_dora=method == "dora")
    for model in (patched, untouched):
        STEPS[step](model)
    assert list(patched.state_dict()) == list(untouched.state_dict())
    assert repr(patched) == repr(untouched)
    torch.testing.assert_close(logits(patched), logits(untouched), rtol=1e-4, atol=1e-5)
    report = fastpeft.report(patched)
    assert not report.reasons
    assert all(is_accelerated(layer) for _, layer in tuner_layers(patched))


def test_disable_context_and_back():
    patched, untouched = pair()
    before = logits(patched)
    with patched.disable_adapter():
        assert torch.equal(logits(patched), logits(untouched.unload()))
    assert torch.equal(logits(patched), before)
    assert fastpeft.report(patched).calls == {"fused": 28, "base": 14}


@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_plain_models_come_out(end):
    patched, untouched = pair()
    ours, theirs = getattr(patched, end)(), getattr(untouched, end)()
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert not list(tuner_layers(ours))


def test_mixed_batches():
    patched, untouched = pair()
    names = ["other", "__base__"]
    with torch.no_grad():
        ours = patched(tokens(), adapter_names=names).logits
        theirs = untouched(tokens(), adapter_names=names).logits
    torch.testing.assert_close(ours, theirs)
    assert fastpeft.report(patched).calls == {"added": 14}
    for wrong, said in ((["other"], "Length of `adapter_names`"),):
        with pytest.raises(ValueError, match=said):
            patched(tokens(), adapter_names=wrong)
    dora, _ = pair(use_dora=True)
    with pytest.raises(ValueError, match="DoRA is enabled"):
        dora(tokens(), adapter_names=names)


@pytest.mark.parametrize("training", [False, True])
def test_activated_lora(training):
    config = lora_config(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).train(training)
    untouched = copy.deepcopy(model)
    fastpeft.patch(model)
    ids = tokens()
    ids[0, 3:5] = torch.tensor([5, 6])  # the other row is the base's
    results = []
    for each in (model, untouched):
        output = each(input_ids=ids, labels=ids)
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert fastpeft.report(model).calls == {"added": 14}


def test_activated_lora_s_dropout_has_the_mean_of_none():
    """In training it goes our way too: for the tokens that have the adapter, and for no other."""
    config = lora_config(alora_invocation_tokens=[5], task_type="CAUSAL_LM", lora_dropout=0.3)
    model = fastpeft.patch(get_peft_model(llama(), config)).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 2, 32).expand(20_000, 2, 32)
    with torch.no_grad():
        samples = layer(x, alora_offsets=[1] * 20_000)
        layer.eval()
        expected = layer(x[:1], alora_offsets=[1])
    assert torch.equal(samples[:, 0], layer.base_layer(x)[:, 0])
    deviation = samples[:, 1].std(0) / 20_000**0.5
    assert (deviation > 1e-6).all()
    assert ((samples[:, 1].mean(0) - expected[0, 1]).abs() < 5 * deviation).all()
    assert fastpeft.report(model).calls == {"added": 2}


def test_saving_and_loading(tmp_path):
    patched, untouched = pair(use_dora=True)
    patched.save_pretrained(tmp_path / "ours")
    untouched.save_pretrained(tmp_path / "theirs")
    for folder in ("", "other"):
        ours, theirs = (
            load_file(tmp_path / o / folder / "adapter_model.safetensors") for o in ("ours", "theirs")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    fresh = fastpeft.patch(get_peft_model(llama(), lora_config(r=1, target_modules=["q_proj"])))
    fresh.load_adapter(tmp_path / "theirs", "loaded")
    fresh.set_adapter("loaded")
    torch.testing.assert_close(logits(fresh), logits(untouched), rtol=1e-4, atol=1e-5)
    assert len(fastpeft.report(fresh).patched) == 14
    again = fastpeft.patch(PeftModel.from_pretrained(llama(), tmp_path / "ours"))
    torch.testing.assert_close(logits(again), logits(untouched), rtol=1e-4, atol=1e-5)


def test_hotswap(tmp_path):
    patched, untouched = pair()
    torch.manual_seed(3)
    get_peft_model(llama(), lora_config(lora_alpha=3)).save_pretrained(tmp_path)
    for model in (patched, untouched):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    torch.testing.assert_close(logits(patched), logits(untouched))
    assert not fastpeft.report(patched).reasons


def merged_for_good(model):
    """Another adapter becomes part of the base: nothing is unmerged."""
    model.merge_adapter(["other"])
    for _, layer in tuner_layers(model):
        layer.merged_adapters.clear()


def base_written(model):
    for _, layer in tuner_layers(model):
        layer.base_layer.weight.data = layer.base_layer.weight.data * 1.5


@pytest.mark.parametrize("change", [merged_for_good, base_written])
def test_norms_are_fresh_after(change):
    """DoRA's kept norms see that the base weight has become another."""
    patched, untouched = pair(use_dora=True)
    before = logits(patched)  # leaves norms to be wrongly used again
    logits(untouched)
    for model in (patched, untouched):
        change(model)
    torch.testing.assert_close(logits(patched), logits(untouched), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(patched), before, rtol=1e-2)
    assert not fastpeft.report(patched).reasons


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "pissa_niter_2"])
def test_initialisations_that_rewrite_the_base(init):
    config = LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj", "up_proj"], use_dora=True)
    untouched = get_peft_model(llama(), config).eval()
    patched = fastpeft.patch(copy.deepcopy(untouched))
    torch.testing.assert_close(logits(patched), logits(untouched), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_are_accelerated_and_apart():
    model = fastpeft.patch(peft_model(use_dora=True))
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert all(is_accelerated(layer) for _, layer in tuner_layers(other))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not logits(other).any()
        assert torch.equal(logits(model), expected)
        assert fastpeft.report(other).calls["fused"] % 14 == 0


# --- models without a PeftModel round them


def test_injected_adapters_and_later_ones():
    model = inject_adapter_in_model(lora_config(), llama())
    untouched = copy.deepcopy(model)
    fastpeft.patch(model)
    torch.testing.assert_close(logits(model), logits(untouched))
    inject_adapter_in_model(lora_config(target_modules=["lm_head"]), model, "head")
    assert len(fastpeft.report(model).patched) == 15


def test_transformers_own_adapters():
    model = llama()
    model.add_adapter(lora_config(target_modules=["q_proj"]), "first")
    fastpeft.patch(model)
    model.add_adapter(lora_config(target_modules=["up_proj"]), "second")
    model.set_adapter("second")
    logits(model)
    assert len(fastpeft.report(model).patched) == 4
    assert fastpeft.report(model).calls == {"base": 2, "fused": 2}


def test_models_that_were_not_patched_stay_pefts():
    fastpeft.patch(peft_model())
    other = peft_model()
    other.add_adapter("more", lora_config(target_modules=["lm_head"]))
    assert not any(is_accelerated(layer) for _, layer in tuner_layers(other))


# --- the patch itself


def test_nothing_but_forward_changes():
    model = peft_model()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = {path: (id(module), type(module)) for path, module in model.named_modules()}
    description, keys = repr(model), list(model.state_dict())
    assert fastpeft.patch(model) is model
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {path: (id(module), type(module)) for path, module in model.named_modules()} == modules
    assert (repr(model), list(model.state_dict())) == (description, keys)


def test_unpatch_gives_pefts_forward_back():
    model = peft_model(lora_dropout=0.5).train()
    torch.manual_seed(1)
    before = logits(model)
    fastpeft.unpatch(fastpeft.patch(model))
    torch.manual_seed(1)
    assert torch.equal(logits(model), before)
    assert not any("forward" in layer.__dict__ for _, layer in tuner_layers(model))
    with pytest.raises(fastpeft.PatchError, match="not patched by fastpeft"):
        fastpeft.report(model)


def test_patching_twice_reaches_new_layers_and_keeps_the_count():
    model = fastpeft.patch(peft_model(target_modules=["q_proj"]))
    logits(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    del layer.__dict__["forward"]
    fastpeft.patch(model)
    logits(model)
    assert is_accelerated(layer)
    assert fastpeft.report(model).calls == {"fused": 4}


def test_report_names_what_is_left_to_peft_and_why():
    class Convolutional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.linear = torch.nn.Linear(4, 4)

    model = get_peft_model(Convolutional(), LoraConfig(target_modules=["conv", "linear"]))
    text = str(fastpeft.report(fastpeft.patch(model)))
    assert "base_model.model.conv: left to PEFT, peft.tuners.lora.layer.Conv2d has no fused forward" in text
    assert "base_model.model.linear: accelerated, Linear with default: LoRA(r=8)" in text
    assert "1 PEFT modules accelerated, 1 left to PEFT" in text


def test_wrong_arguments(tmp_path):
    model = peft_model()
    with pytest.raises(fastpeft.PatchError, match="expected no configuration, got LoRA"):
        fastpeft.patch(model, fastpeft.LoRA())
    with pytest.raises(fastpeft.PatchError, match="holds no LoRA layer of PEFT's, only Linear"):
        fastpeft.patch(get_peft_model(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])))
    with pytest.raises(fastpeft.PatchError, match=r"PEFT's save_pretrained\(folder\) writes them"):
        fastpeft.save(model, tmp_path)
    fastpeft.save(fastpeft.patch(gpt2(), fastpeft.LoRA(r=1)), tmp_path)
    with pytest.raises(fastpeft.CheckpointError, match=r"PEFT's model.load_adapter\(folder, name\) reads it"):
        fastpeft.load(model, tmp_path)
