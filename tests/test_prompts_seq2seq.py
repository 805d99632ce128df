"""Prefix and prompt tuning beside an encoder (T5, BART): PEFT's numbers, files and generation."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EncoderDecoderCache,
    T5Config,
    T5ForConditionalGeneration,
)

import fastpeft
from fastpeft import PrefixTuning, PromptTuning
from tests import architectures
from tests.models import VOCABULARY, llama
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
    "prompt-1": (
        PromptTuning(num_virtual_tokens=N, num_transformer_submodules=1),
        peft.PromptTuningConfig,
        {"num_transformer_submodules": 1},
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore")


def talkative(model):
    """One whose head is not its embeddings, with which a tiny model repeats the last token for ever."""
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32))
    return model.eval()


def t5(layers=2, heads=4, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=heads, vocab_size=VOCABULARY,
        decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0, initializer_factor=4.0, **options,
    )  # fmt: skip
    return talkative(T5ForConditionalGeneration(config)).to(dtype)


def bart(layers=3, scale=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = BartConfig(
        d_model=32, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCABULARY,
        max_position_embeddings=64, dropout=0.0, scale_embedding=scale, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.3,
    )  # fmt: skip
    return talkative(BartForConditionalGeneration(config)).to(dtype)


MODELS = {"t5": t5, "t5-3": lambda: t5(3), "bart": bart}


def ids(seed=3, length=7):
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def mask_of(length=7):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -3:] = 0
    return mask


def inputs(kind):
    given = {"input_ids": ids(), "decoder_input_ids": ids(4, 6), "labels": ids(5, 6)}
    if kind == "masks":
        given.update(attention_mask=mask_of(), decoder_attention_mask=mask_of(6))
    if kind == "labels":
        del given["decoder_input_ids"]
    return given


def both(make, case):
    """The same model with our virtual tokens and with PEFT's, which have the same values."""
    config, kind, options = CASES[case]
    model = fastpeft.patch(make(), config)
    theirs = peft.get_peft_model(make(), kind(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N, **options))
    their_encoder = theirs.prompt_encoder["default"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        names = [name for name, _ in their_encoder.named_parameters()]
        assert [name for name, _ in model.prompt_encoder.named_parameters()] == names
        for name, parameter in model.prompt_encoder.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            their_encoder.get_parameter(name).copy_(parameter)
    return model, theirs.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_pefts(case, name):
    make = MODELS[name]
    model, theirs = both(make, case)
    for kind in ("plain", "masks", "labels"):
        given = inputs(kind)
        ours, expected = model(**given), theirs(**given)
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
    given = inputs("plain")
    with fastpeft.disable_adapters(model), torch.no_grad():
        assert torch.equal(model(**given).logits, make()(**given).logits)
    with torch.no_grad():
        assert not torch.allclose(model(**given).logits, make()(**given).logits, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_generation_is_pefts_and_that_of_whole_forwards(case, name):
    make = lambda: MODELS[name]().double()  # noqa: E731
    model, theirs = both(make, case)
    theirs.double()  # PEFT makes its encoder in fp32
    details = {"return_dict_in_generate": True, "output_logits": True}
    for mask in (torch.ones_like(ids()), mask_of()):
        for beams in (1, 3):
            asked = {**GREEDY, **details, "attention_mask": mask, "num_beams": beams}
            found, expected = model.generate(ids(), **asked), theirs.generate(input_ids=ids(), **asked)
            assert torch.equal(found.sequences, expected.sequences)
            for step, other in zip(found.logits, expected.logits, strict=True):
                torch.testing.assert_close(step, other, rtol=1e-6, atol=1e-6)  # generate rounds to fp32
        found = model.generate(ids(), attention_mask=mask, **GREEDY, **details)
        decoded = torch.full((2, 1), model.config.decoder_start_token_id)
        for step in found.logits:
            logits = model(input_ids=ids(), attention_mask=mask, decoder_input_ids=decoded).logits[:, -1]
            torch.testing.assert_close(step, logits.float(), rtol=1e-6, atol=1e-6)
            decoded = torch.cat([decoded, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(found.sequences, decoded)
        without = make().generate(ids(), attention_mask=mask, **GREEDY, **details)
        assert not torch.allclose(without.logits[0], found.logits[0], atol=0.1)


@torch.no_grad()
def test_cached_steps_are_whole_forwards():
    for case in CASES:
        for make in MODELS.values():
            model, _ = both(lambda make=make: make().double(), case)
            decoded = ids(4, 6)
            whole = model(input_ids=ids(), attention_mask=mask_of(), decoder_input_ids=decoded).logits
            given = {"input_ids": ids(), "attention_mask": mask_of()}
            first = model(**given, decoder_input_ids=decoded[:, :4], use_cache=True)
            assert isinstance(first.past_key_values, EncoderDecoderCache)
            rest = model(
                encoder_outputs=(first.encoder_last_hidden_state,),
                attention_mask=mask_of(),
                decoder_input_ids=decoded[:, 4:],
                past_key_values=first.past_key_values,
            )
            found = torch.cat([first.logits, rest.logits], dim=1)
            torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
@pytest.mark.parametrize("case", CASES)
def test_files_go_both_ways(case, make, tmp_path):
    model, _ = both(make, case)
    given = inputs("masks")
    expected = model(**given).logits
    fastpeft.save(model, tmp_path / "ours")
    again = fastpeft.load(make(), tmp_path / "ours")
    torch.testing.assert_close(again(**given).logits, expected, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
    torch.testing.assert_close(theirs(**given).logits, expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = fastpeft.load(make(), tmp_path / "theirs")
    assert torch.equal(back(**given).logits, again(**given).logits)
    stored = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert torch.equal(*(s["prompt_embeddings"] for s in stored))
    back.prompt_encoder.embedding.weight.zero_()
    fastpeft.load(back, tmp_path / "theirs")
    assert torch.equal(back(**given).logits, again(**given).logits)


@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
@pytest.mark.parametrize("case", CASES)
def test_lifecycle(case, make):
    model = make()
    before = snapshot(model)
    fastpeft.patch(model, CASES[case][0])
    given = inputs("masks")
    with torch.no_grad():
        expected = model(**given).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**given).logits, expected)
            twin.prompt_encoder.embedding.weight.add_(1.0)
            assert not torch.equal(twin(**given).logits, expected)
            assert torch.equal(model(**given).logits, expected)
            fastpeft.unpatch(twin)
            assert torch.equal(twin(**given).logits, make()(**given).logits)
    fastpeft.unpatch(model)
    assert_unchanged(model, before)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "_fastpeft_prompt" not in module.__dict__


@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
@pytest.mark.parametrize("case", CASES)
def test_training_in_bf16(case, make):
    torch.manual_seed(0)
    model = fastpeft.patch(make(dtype=torch.bfloat16), CASES[case][0]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=0.03)
    losses = []
    for _ in range(15):
        loss = model(**inputs("masks")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_embeddings_as_input_are_the_ids():
    for make in (t5, bart):
        for config, _, _ in CASES.values():
            model = fastpeft.patch(make(), config)
            given = inputs("masks")
            with torch.no_grad():
                expected = model(**given).logits
                embeddings = model.get_encoder().get_input_embeddings()(given.pop("input_ids"))
                assert torch.equal(model(inputs_embeds=embeddings, **given).logits, expected)


def test_heads_that_do_not_make_up_the_width(tmp_path):
    """T5-11B's 128 heads of 128 over a width of 1024: PEFT cannot make such a prefix, and can read ours."""
    make = lambda: t5(heads=6)  # noqa: E731
    model = fastpeft.patch(make(), PrefixTuning(num_virtual_tokens=N))
    assert model.prompt_encoder().shape == (N, 2 * 2 * 6 * 8)
    fastpeft.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(**inputs("masks")).logits
        torch.testing.assert_close(model(**inputs("masks")).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_decoder_of_another_depth():
    model = fastpeft.patch(t5(2, num_decoder_layers=3), PrefixTuning(num_virtual_tokens=N))
    assert model.prompt_encoder.shape == (3, 4, 8)
    model(**inputs("masks")).loss.backward()
    assert model.prompt_encoder.embedding.weight.grad.view(N, 3, -1).norm(dim=(0, 2)).gt(0).all()


def test_layers_take_the_rows_that_pefts_do():
    """Layer l the rows of layer 2 l mod layers: of two layers both take the first's rows."""
    model = fastpeft.patch(t5(2), PrefixTuning(num_virtual_tokens=N))
    model(**inputs("plain")).loss.backward()
    first, second = model.prompt_encoder.embedding.weight.grad.view(N, 2, -1).unbind(1)
    assert first.norm() > 0
    assert not second.any()


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (t5, PrefixTuning(num_virtual_tokens=2, num_transformer_submodules=1), "expected 2 or None, got 1"),
        (
            llama,
            PrefixTuning(num_virtual_tokens=2, num_transformer_submodules=2),
            "has no encoder and decoder",
        ),
        (
            llama,
            PromptTuning(num_virtual_tokens=2, num_transformer_submodules=2),
            "has no encoder and decoder",
        ),
        (architectures.ARCHITECTURES["whisper"][0], PromptTuning(num_virtual_tokens=2), "Whisper.* is none"),
    ],
    ids=["one-of-two", "two-of-one", "prompt-two-of-one", "speech"],
)
def test_refusals_leave_the_model_alone(make, config, said):
    model = make()
    before = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=said):
        fastpeft.patch(model, config)
    assert_unchanged(model, before)


def test_what_cannot_be_is_refused():
    with pytest.raises(
        fastpeft.ConfigError, match="num_transformer_submodules: expected 1, 2 or None, got 3"
    ):
        PrefixTuning(num_virtual_tokens=1, num_transformer_submodules=3)
    model = fastpeft.patch(t5(), PrefixTuning(num_virtual_tokens=2)).train()
    with pytest.raises(
        fastpeft.ShapeError, match="expected decoder_input_ids, decoder_inputs_embeds or labels"
    ):
        model(encoder_outputs=(torch.zeros(2, 3, 32),))
    model.gradient_checkpointing_enable()
    with pytest.raises(fastpeft.PatchError, match="activation checkpointing leaves out"):
        model(**inputs("plain"))
    model = fastpeft.patch(t5(), PromptTuning(num_virtual_tokens=2))
    with pytest.raises(fastpeft.ShapeError, match="expected input_ids or inputs_embeds, got neither"):
        model(decoder_input_ids=ids())


def test_folders_that_do_not_fit_change_nothing(tmp_path):
    fastpeft.save(fastpeft.patch(t5(), PromptTuning(num_virtual_tokens=N)), tmp_path)
    for model, said in (
        (llama(), "has no encoder and decoder"),
        (
            fastpeft.patch(t5(), PrefixTuning(num_virtual_tokens=N)),
            "is PrefixTuning, the folder holds Prompt",
        ),
        (fastpeft.patch(t5(), CASES["prompt-1"][0]), r"expected shape \[5, 32\], got \[10, 32\]"),
    ):
        before = snapshot(model)
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.load(model, tmp_path)
        assert_unchanged(model, before)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    assert content["task_type"] == "SEQ_2_SEQ_LM"
    assert content["num_transformer_submodules"] == 2
    file.write_text(json.dumps({**content, "num_virtual_tokens": 6}))
    with pytest.raises(fastpeft.CheckpointError, match="declares 6 virtual tokens for each of 2 submodules"):
        fastpeft.load(t5(), tmp_path)
