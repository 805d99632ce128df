"""Prefix and prompt tuning: PEFT's numbers and files, generation, and the way back."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

import fastpeft
from fastpeft import PrefixTuning, PromptTuning
from tests import architectures
from tests.models import gpt2, llama, tokens
from tests.test_bitfit import bert
from tests.test_patch import assert_unchanged, snapshot
from tests.tolerance import relative_error

N = 5
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CASES = {
    "prefix": (PrefixTuning(num_virtual_tokens=N), peft.PrefixTuningConfig, {}),
    "prefix-mlp": (
        PrefixTuning(num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=7),
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 7},
    ),
    "prompt": (PromptTuning(num_virtual_tokens=N), peft.PromptTuningConfig, {}),
}
DECODERS = ["llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2", "gpt-neox", "opt"]


def both(make, case):
    """The same model with our virtual tokens and with PEFT's, which have the same values."""
    config, kind, options = CASES[case]
    model = fastpeft.patch(make(), config)
    theirs = peft.get_peft_model(make(), kind(task_type="CAUSAL_LM", num_virtual_tokens=N, **options))
    their_encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        for name, parameter in model.prompt_encoder.named_parameters():
            parameter.normal_()
            their_encoder.get_parameter(name).copy_(parameter)
    return model, theirs.eval()


def padded():
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    return mask


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_pefts(case, name):
    def make():
        model = architectures.ARCHITECTURES[name][0]()
        if name in ("opt", "gpt-neox"):  # the table's sizes, which these do not know
            del model.config.num_key_value_heads
        return model

    model, theirs = both(make, case)
    for mask in (None, padded()):
        inputs = {"input_ids": tokens(), "labels": tokens(), "attention_mask": mask}
        ours, expected = model(**inputs), theirs(**inputs)
        torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.loss, expected.loss)
        model.zero_grad()
        theirs.zero_grad()
        ours.loss.backward()
        expected.loss.backward()
        for key, parameter in model.prompt_encoder.named_parameters():
            other = theirs.prompt_encoder["default"].get_parameter(key)
            assert relative_error(parameter.grad, other.grad) < 1e-4, key
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"prompt_encoder.{n}" for n, _ in model.prompt_encoder.named_parameters()
    }
    torch.testing.assert_close(model(tokens()).logits, theirs(tokens()).logits, rtol=1e-4, atol=1e-5)
    with fastpeft.disable_adapters(model), torch.no_grad():
        assert torch.equal(model(tokens()).logits, make()(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("case", CASES)
def test_generation_is_that_of_whole_forwards(case, make):
    model, _ = both(make, case)
    for mask in (torch.ones_like(tokens()), padded()):
        found = model.generate(tokens(), attention_mask=mask, **GREEDY)
        ids, seen = tokens(), mask
        for _ in range(6):
            # As generate counts them: padding has no positions.
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=seen, position_ids=positions).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        assert torch.equal(found, ids)
    if make is llama:  # GPT-2's tied weights repeat the last token whatever comes before
        assert not torch.equal(found, make().generate(tokens(), attention_mask=mask, **GREEDY))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(case, make, tmp_path):
    model, _ = both(make, case)
    with torch.no_grad():
        expected = model(tokens()).logits
        fastpeft.save(model, tmp_path / "ours")
        again = fastpeft.load(make(), tmp_path / "ours")
        torch.testing.assert_close(again(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        back = fastpeft.load(make(), tmp_path / "theirs")
        assert torch.equal(back(tokens()).logits, again(tokens()).logits)
        stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
        assert [list(s) for s in stored] == [["prompt_embeddings"]] * 2
        assert torch.equal(*(s["prompt_embeddings"] for s in stored))
        back.prompt_encoder.embedding.weight.zero_()
        fastpeft.load(back, tmp_path / "theirs")
        assert torch.equal(back(tokens()).logits, again(tokens()).logits)


@pytest.mark.parametrize("case", CASES)
def test_lifecycle(case):
    model = llama()
    before = snapshot(model)
    fastpeft.patch(model, CASES[case][0])
    assert fastpeft.report(model).patched == ("prompt_encoder",)
    with torch.no_grad():
        expected = model(tokens()).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(tokens()).logits, expected)
            fastpeft.unpatch(twin)
            assert torch.equal(twin(tokens()).logits, llama()(tokens()).logits)
    fastpeft.unpatch(model)
    assert_unchanged(model, before)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("case", CASES)
def test_training_in_bf16(case):
    torch.manual_seed(0)
    model = fastpeft.patch(llama(torch.bfloat16), CASES[case][0]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(15):
        loss = model(input_ids=tokens(), labels=tokens(), attention_mask=padded()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_starts():
    zero = fastpeft.patch(llama(), PrefixTuning(num_virtual_tokens=N, init_weights="zero"))
    assert not zero.prompt_encoder().any()
    zero = fastpeft.patch(
        llama(), PrefixTuning(num_virtual_tokens=N, init_weights="zero", prefix_projection=True)
    )
    assert not zero.prompt_encoder().any()
    model = fastpeft.patch(llama(), PromptTuning(num_virtual_tokens=N, prompt_tuning_init="SAMPLE_VOCAB"))
    table = model.get_input_embeddings().weight
    assert all((table == row).all(dim=1).any() for row in model.prompt_encoder())


def test_embeddings_as_input_are_the_ids():
    for config, _, _ in CASES.values():
        model = fastpeft.patch(llama(), config)
        with torch.no_grad():
            expected = model(tokens()).logits
            embeddings = model.get_input_embeddings()(tokens())
            assert torch.equal(model(inputs_embeds=embeddings).logits, expected)


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (architectures.ARCHITECTURES["whisper"][0], PrefixTuning(num_virtual_tokens=2), "Whisper.* is none"),
        (lambda: torch.nn.Linear(2, 2), PromptTuning(num_virtual_tokens=2), "and Linear is none"),
        (llama, PromptTuning(num_virtual_tokens=2, modules_to_save=["score"]), "matches score"),
    ],
    ids=["speech", "no-config", "to-save"],
)
def test_refusals_leave_the_model_alone(make, config, said):
    model = make()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=said):
        fastpeft.patch(model, config)
    assert_unchanged(model, before)


def test_what_cannot_be_is_refused_when_called():
    model = fastpeft.patch(llama(), PrefixTuning(num_virtual_tokens=2)).train()
    with pytest.raises(fastpeft.ShapeError, match="neither"):
        model(attention_mask=padded())
    with pytest.raises(fastpeft.ShapeError, match=r"attention_mask \[batch, tokens\], got \[2, 1, 9, 9\]"):
        model(tokens(), attention_mask=torch.zeros(2, 1, 9, 9))
    model.gradient_checkpointing_enable()
    with pytest.raises(fastpeft.PatchError, match="activation checkpointing leaves out"):
        model(tokens())


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            PrefixTuning,
            {"num_virtual_tokens": 0},
            "num_virtual_tokens: expected a whole number",
        ),
        (PrefixTuning, {"num_virtual_tokens": 1, "encoder_hidden_size": 0}, "encoder_hidden_size: expected"),
        (
            PrefixTuning,
            {"num_virtual_tokens": 1, "init_weights": "one"},
            "expected 'zero' or None, got 'one'",
        ),
        (PromptTuning, {"num_virtual_tokens": 1, "prompt_tuning_init": "TEXT"}, "'RANDOM' or 'SAMPLE_VOCAB'"),
    ],
    ids=["tokens", "hidden", "init", "text"],
)
def test_bad_values_are_named(kind, options, said):
    with pytest.raises(fastpeft.ConfigError, match=said):
        kind(**options)


@pytest.mark.filterwarnings("ignore")
def test_folders_that_do_not_fit_change_nothing(tmp_path):
    fastpeft.save(fastpeft.patch(llama(), PrefixTuning(num_virtual_tokens=N)), tmp_path)
    for model, said in (
        (
            fastpeft.patch(llama(), PrefixTuning(num_virtual_tokens=3)),
            r"expected shape \[3, 64\], got \[5, 64\]",
        ),
        (fastpeft.patch(llama(), CASES["prefix-mlp"][0]), "made by an MLP"),
        (
            fastpeft.patch(llama(), PromptTuning(num_virtual_tokens=N)),
            "is PromptTuning, the folder holds Prefix",
        ),
        (gpt2(), r"prompt_embeddings: expected shape \[5, 128\], got \[5, 64\]"),
        (bert(), "and BertForSequenceClassification is none"),
    ):
        before = snapshot(model)
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.load(model, tmp_path)
        assert_unchanged(model, before)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for change, said in (
        ({"num_virtual_tokens": 6}, "declares 6 virtual tokens"),
        ({"num_transformer_submodules": 2}, "has no encoder and decoder"),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.load(llama(), tmp_path)


def test_pefts_configuration():
    model = fastpeft.patch(llama(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert model.prompt_encoder().shape == (3, 2 * 2 * 16)
    model = fastpeft.patch(llama(), peft.PromptTuningConfig(num_virtual_tokens=3))
    assert model.prompt_encoder().shape == (3, 32)
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "y"}
    with pytest.raises(fastpeft.ConfigError, match=r"expected .RANDOM. or .SAMPLE_VOCAB.*TEXT"):
        fastpeft.patch(llama(), peft.PromptTuningConfig(num_virtual_tokens=3, **text))


def test_how_a_prompt_began_does_not_matter_to_its_file(tmp_path):
    model = fastpeft.patch(llama(), PromptTuning(num_virtual_tokens=N))
    fastpeft.save(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "y"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **text}))
    again = fastpeft.load(llama(), tmp_path)
    assert torch.equal(again.prompt_encoder(), model.prompt_encoder())


def test_heads_of_other_tasks():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        pad_token_id=0,
    )  # fmt: skip
    for method in (PrefixTuning(num_virtual_tokens=3), PromptTuning(num_virtual_tokens=3)):
        model = LlamaForSequenceClassification(config).eval()
        base = model(tokens()[:1]).logits
        fastpeft.patch(model, dataclasses.replace(method, modules_to_save=["score"]))
        output = model(tokens()[:1], labels=torch.tensor([1]))
        assert not torch.equal(output.logits, base)
        output.loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {"score.weight", "prompt_encoder.embedding.weight"}
