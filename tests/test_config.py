"""The configuration checks itself and reads PEFT's."""

from __future__ import annotations

import dataclasses

import peft
import pytest

import fastpeft


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r: expected a whole number of at least 1, got 0"),
        ({"r": 8.0}, "r: expected a whole number of at least 1, got 8.0"),
        ({"r": True}, "r: expected a whole number of at least 1, got True"),
        ({"lora_alpha": 0}, "lora_alpha: expected a number above 0, got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a number above 0, got nan"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected a number in [0, 1), got 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout: expected a number in [0, 1), got -0.1"),
        ({"bias": "some"}, "bias: expected 'none', 'all' or 'lora_only', got 'some'"),
        ({"use_dora": 1}, "use_dora: expected True or False, got 1"),
        ({"dora_dropout": "base"}, "dora_dropout: expected 'base_and_adapter' or 'adapter', got 'base'"),
        ({"target_modules": []}, "target_modules: expected at least one name, got an empty list"),
        ({"target_modules": 3}, "target_modules: expected a list of module names, got 3"),
        ({"target_modules": ["q", 1]}, "target_modules: expected a list of module names"),
        ({"target_modules": "(["}, "target_modules: '([' is not a regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected a list of module names, got 'lm_head'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q']: expected a whole number of at least 1, got 0"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern['q']: expected a number above 0, got -1"),
        ({"rank_pattern": [1]}, "rank_pattern: expected a dict"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "r: expected an even rank for the orthogonal"),
        ({"layers_to_transform": [-1]}, "layers_to_transform: expected block indices of at least 0"),
        (
            {"init_lora_weights": "pissa_niter_"},
            "'orthogonal', 'olora', 'pissa' or 'pissa_niter_N' for N power iterations, got 'pissa_niter_'",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(options, said):
    with pytest.raises(fastpeft.ConfigError) as error:
        fastpeft.LoRA(**options)
    assert said in str(error.value)


def test_it_is_frozen_and_hashes_no_surprises():
    config = fastpeft.LoRA(r=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 8
    assert fastpeft.LoRA(target_modules=["a", "b"]) == fastpeft.LoRA(target_modules=("a", "b"))
    assert fastpeft.LoRA(target_modules={"b", "a"}).target_modules == ("a", "b")
    assert fastpeft.LoRA(layers_to_transform=3).layers_to_transform == (3,)


def test_every_shared_field_comes_over_from_peft():
    theirs = peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["q_proj"], exclude_modules=["x"], use_dora=True,
        use_rslora=True, bias="lora_only", modules_to_save=["head"], rank_pattern={"q": 2},
        alpha_pattern={"q": 3}, layers_to_transform=[0, 2],
        init_lora_weights="gaussian", task_type="CAUSAL_LM",
    )  # fmt: skip
    ours = fastpeft.LoRA.from_peft(theirs)
    assert ours.dora_dropout == "base_and_adapter", "PEFT's meaning, which has no field there"
    for field in dataclasses.fields(ours):
        if field.name in ("dora_dropout", "freeze_lora_A"):
            continue
        value = getattr(theirs, field.name)
        value = tuple(sorted(value)) if isinstance(value, (list, set)) else value
        assert getattr(ours, field.name) == value, field.name


def test_peft_defaults_come_over():
    ours = fastpeft.LoRA.from_peft(peft.LoraConfig())
    assert (ours.r, ours.lora_alpha, ours.target_modules, ours.modules_to_save) == (8, 8, None, ())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "eva", "eva_config": peft.EvaConfig()}, "init_lora_weights='eva'"),
        ({"layer_replication": [(0, 2)]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_honoured_is_refused_not_ignored(options, said):
    with pytest.raises(fastpeft.ConfigError, match="does not honour") as error:
        fastpeft.LoRA.from_peft(peft.LoraConfig(**options))
    assert said in str(error.value)


def test_other_peft_methods_are_refused():
    with pytest.raises(fastpeft.ConfigError, match="peft_type 'IA3'"):
        fastpeft.LoRA.from_peft(peft.IA3Config())


def test_backend_choice(monkeypatch):
    assert fastpeft.get_backend() == "auto"
    with fastpeft.use_backend("torch"):
        assert fastpeft.get_backend() == "torch"
    assert fastpeft.get_backend() == "auto"
    with pytest.raises(fastpeft.ConfigError, match="expected one of auto, torch, triton, got 'cuda'"):
        fastpeft.set_backend("cuda")
