"""What a live model holds is what the planner says, for every method, in every phase of a step."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model

import fastpeft
from fastpeft import LISA, BitFit, LayerSparse, LayerSparseAdamW, LoRA, VeRA
from fastpeft.instruments import account
from fastpeft.planning import methods
from fastpeft.planning.names import NAMES
from tests.test_plan import BATCH, SEQUENCE, real_model

LAYERED = ("lisa", "badam", "topk", "ist")


@pytest.mark.parametrize("name", [*(n for n in NAMES if n not in LAYERED), "galore"])
def test_consistent_with_the_planner(name):
    options = {"attention_bias": True} if name == "bitfit" else {}
    method, optimizer_name = ("full", name) if name == "galore" else (name, "adamw")
    if name == "galore":
        pytest.importorskip("galore_torch")
    model = real_model(dtype=torch.bfloat16, **options)
    plan = fastpeft.plan(model, method, BATCH, SEQUENCE, optimizer=optimizer_name)
    methods.parse(method).prepare(model)
    if name == "galore":
        from fastpeft.planning.peers import galore

        optimizer = galore(model)
    else:
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    if name == "adalora":
        fastpeft.RankAllocator(model, optimizer)  # its scores are the optimiser's state
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    start = account(model, optimizer)
    assert (start.gradients, start.optimizer_state) == (0, 0)
    model(input_ids=ids, labels=ids).loss.backward()
    after_backward = account(model, optimizer)
    optimizer.step()
    after_step = account(model, optimizer)
    assert after_backward.gradients == after_step.gradients == plan.gradients > 0
    assert after_step.optimizer_state == plan.optimizer_state > 0
    assert after_step.weights == plan.weights
    assert (after_step.trained, after_step.parameters) == (plan.setting.trainable, plan.setting.parameters)
    assert after_step.active == after_step.trained
    for layer, found in plan.layers.items():
        for kind in ("weights", "gradients", "optimizer_state"):
            assert after_step.layers.get(layer, {}).get(kind, 0) == found.get(kind, 0), (layer, kind)
    base = account(real_model(dtype=torch.bfloat16, **options))
    assert after_step.weights - after_step.adapters == base.weights
    assert (after_step.adapters == 0) == (name in ("full", "galore", "bitfit"))
    optimizer.zero_grad()
    assert account(model, optimizer).gradients == 0


def test_known_numbers():
    model = fastpeft.patch(real_model(), LoRA(r=2, target_modules=["q_proj"]))  # 32 to 32, in 3 blocks
    found = account(model)
    assert found.trained == found.active == 3 * 2 * (32 + 32)
    assert found.adapters == 4 * found.trained
    assert found.layers["model.layers.1"]["adapters"] == 4 * 2 * 64
    assert found.share == found.trained / sum(p.numel() for p in model.parameters())
    assert f"{found.trained:,} of {found.parameters:,} parameters may train" in str(found)
    fastpeft.unpatch(model)
    assert account(model).adapters == 0


def test_frozen_parts_of_adapters_and_tied_weights_count_once():
    tied = real_model(tie_word_embeddings=True)
    assert account(tied).weights == account(real_model()).weights - 4 * 64 * 32
    model = fastpeft.patch(real_model(tie_word_embeddings=True), VeRA(r=4, target_modules=["q_proj"]))
    found = account(model)
    assert found.adapters == 4 * (4 * 32 + 32 * 4) + 4 * found.trained  # one pair, and the vectors
    bits = account(fastpeft.patch(real_model(attention_bias=True), BitFit()))
    assert bits.adapters == 0
    assert bits.trained == 3 * (32 + 2 * 16 + 32)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_schedules_share(wrapped):
    model = real_model(dtype=torch.bfloat16)
    if wrapped:
        adamw = torch.optim.AdamW(model.parameters())
        optimizer, known = adamw, LayerSparse(adamw, model, LISA(layers=1, period=1), on_deactivate="keep")
    else:
        known = optimizer = LayerSparseAdamW(model, schedule=LISA(layers=1, period=1), on_deactivate="keep")
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    everything = sum(p.numel() for p in model.parameters())
    seen = set()
    for _ in range(6):
        sparse = known if wrapped else known.sparse
        seen.update(sparse.active)
        model(input_ids=ids, labels=ids).loss.backward()
        found = account(model, known)
        assert (found.trained, found.active) == (everything, everything - 2 * block)
        assert found.gradients == 2 * found.active
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) > 1
    held = everything - (3 - len(seen)) * block
    unseen = tuple(f"model.layers.{i}." for i in range(3) if f"model.layers.{i}" not in seen)
    states = sum(not unseen or not name.startswith(unseen) for name, _ in model.named_parameters())
    assert account(model, known).optimizer_state == 2 * 2 * held + 4 * states


def test_pefts_adapters():
    model = get_peft_model(real_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    found = account(model)
    assert found.trained == 3 * 2 * 64
    assert found.adapters == 4 * found.trained
    assert account(fastpeft.patch(model)) == found
    vera = account(get_peft_model(real_model(), VeraConfig(r=4, target_modules=["q_proj"])))
    ours = account(fastpeft.patch(real_model(), VeRA(r=4, target_modules=["q_proj"])))
    assert (vera.trained, vera.adapters) == (ours.trained, ours.adapters)
