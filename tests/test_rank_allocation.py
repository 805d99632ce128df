"""AdaLoRA's allocation: PEFT's scores and masks, resumed to the bit, and layers that train in turns."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator as PeftsAllocator
from torch import nn
from transformers import Trainer, TrainingArguments

import fastpeft
from fastpeft import IST, LISA, LayerSparseAdamW, RankAllocator
from fastpeft.allocation import scores
from fastpeft.allocation.callback import RankAllocatorCallback
from fastpeft.layers.adalora import KINDS, Ranks
from fastpeft.methods.linears import adapter_layers
from tests.models import VOCABULARY, llama
from tests.test_adalora import ours, pefts, same_values

pytestmark = pytest.mark.filterwarnings("ignore")
RUN = {
    "init_r": 6,
    "target_r": 2,
    "total_step": 24,
    "tinit": 3,
    "tfinal": 6,
    "deltaT": 2,
    "orth_reg_weight": 0.1,
}
ROOT = Path(__file__).parent.parent
LAYERS = 14  # of the tiny Llama


def batch(step):
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(100 + step))
    return {"input_ids": ids, "labels": ids}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, first, last, after=lambda step: None):
    losses = []
    for step in range(first, last):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pattern_of_pefts(model):
    found = model.peft_config["default"].rank_pattern or {}
    return {name.removesuffix(".lora_E.default"): tuple(kept) for name, kept in found.items()}


def test_a_whole_run_is_pefts():
    """Scores, budget, masks and losses of 24 steps, from the same start on the same batches."""
    model, theirs = ours(llama, **RUN).train(), pefts(llama, **RUN).train()
    same_values(model, theirs, std=0.05)
    optimizers = [torch.optim.AdamW(trained(m), lr=5e-3) for m in (model, theirs)]
    allocator = RankAllocator(model, optimizers[0])
    patterns = []
    losses = train(model, optimizers[0], 0, 24, lambda _: patterns.append(allocator.pattern))
    expected_patterns = []

    def allocate(step):
        theirs.base_model.update_and_allocate(step)
        expected_patterns.append(pattern_of_pefts(theirs))

    expected = train(theirs, optimizers[1], 0, 24, allocate)
    assert losses == pytest.approx(expected, rel=2e-4)
    assert patterns == expected_patterns
    left = [sum(map(sum, pattern.values())) for pattern in patterns]
    assert left[3] == 0, "none before the first allocation"
    assert left[4] > left[8] > left[12] > left[17]
    assert left[18:] == [2 * LAYERS] * 6
    for path, layer in adapter_layers(model):
        kept = torch.tensor(allocator.pattern[path])
        assert torch.equal(layer.lora_E["default"].view(-1) != 0, kept)
        other = theirs.base_model.model.get_submodule(path)
        assert torch.equal(layer.lora_E["default"] != 0, other.lora_E["default"] != 0)


def test_the_same_gradients_give_pefts_scores_to_the_bit():
    model, theirs = ours(llama, **RUN), pefts(llama, **RUN)
    same_values(model, theirs)
    config = theirs.peft_config["default"]
    reference = PeftsAllocator(theirs.base_model.model, config, "default")
    allocator = RankAllocator(model)
    generator = torch.Generator().manual_seed(0)
    for step in range(18):
        for path, layer in adapter_layers(model):
            for kind in KINDS:
                mine = getattr(layer, kind)["default"]
                other = getattr(theirs.base_model.model.get_submodule(path), kind)["default"]
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad.clone()
        budget, pattern = reference.update_and_allocate(theirs.base_model.model, step)
        assert fastpeft.update_and_allocate(model, step) == budget
        for path, layer in adapter_layers(model):
            other = theirs.base_model.model.get_submodule(path)
            assert torch.equal(layer.lora_E["default"], other.lora_E["default"])
            sensitivity, uncertainty = layer.specs["default"].ranks.scores[f"{path}.lora_A"]
            assert torch.equal(sensitivity, reference.exp_avg_ipt[f"{path}.lora_A.default"])
            assert torch.equal(uncertainty, reference.exp_avg_unc[f"{path}.lora_A.default"])
        if pattern:
            found = {f"{path}.lora_E.default": list(kept) for path, kept in allocator.pattern.items()}
            assert found == pattern


def test_the_budget_is_the_papers():
    config = fastpeft.AdaLoRA(**RUN)
    found = [scores.budget_at(config, step, 60, 10) for step in range(24)]
    assert found[:4] == [(60, False)] * 4
    assert found[4] == (int(40 * (14 / 15) ** 3 + 20), True)
    assert [allocates for _, allocates in found[3:9]] == [False, True, False, True, False, True]
    assert found[18:] == [(20, True)] * 6
    assert torch.equal(
        scores.kept_within(torch.tensor([3.0, 1.0, 2.0]), 2), torch.tensor([True, False, True])
    )
    assert scores.kept_within(torch.tensor([1.0, 2.0]), 2).all()


def make(policy="plain"):
    model = ours(llama, **RUN, lora_dropout=0.1).train()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    if policy == "plain":
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
        return model, optimizer, RankAllocator(model, optimizer)
    schedule = IST(layers=1, update_every=3) if policy == "keep" else LISA(layers=1, period=2)
    optimizer = LayerSparseAdamW(model, 5e-3, schedule=schedule, on_deactivate=policy)
    return model, optimizer, RankAllocator(model, optimizer)


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("policy", ["plain", "keep", "drop"])
@pytest.mark.parametrize("stop", [2, 7, 20], ids=["before", "amid", "after"])
def test_a_resumed_run_goes_on_to_the_bit(policy, stop, tmp_path):
    whole, optimizer, allocator = make(policy)
    torch.manual_seed(8)
    losses = train(whole, optimizer, 0, 24)
    first, optimizer, half = make(policy)
    torch.manual_seed(8)
    head = train(first, optimizer, 0, stop)
    fastpeft.save_training(first, optimizer, tmp_path)
    second, optimizer, other = make(policy)
    torch.manual_seed(99)
    fastpeft.load_training(second, optimizer, tmp_path)
    assert other.steps == stop
    assert other.pattern == half.pattern
    assert head + train(second, optimizer, stop, 24) == losses
    assert other.pattern == allocator.pattern
    assert same(second, whole)
    assert not any("adalora" in key for state in optimizer.state.values() for key in state), (
        "all is given back"
    )


@pytest.mark.parametrize("allocator_first", [False, True], ids=["schedule-first", "allocator-first"])
@pytest.mark.parametrize("loaded_first", [False, True])
def test_state_dict_in_any_order(allocator_first, loaded_first):
    def build(state=None):
        model = ours(llama, **RUN).train()
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        made = []
        for kind in ("allocator", "schedule") if allocator_first else ("schedule", "allocator"):
            if kind == "schedule":
                fastpeft.LayerSparse(optimizer, model, IST(layers=1))
            else:
                made.append(RankAllocator(model, optimizer))
        return model, optimizer, made[0]

    model, optimizer, allocator = build()
    train(model, optimizer, 0, 8)
    before = {p: dict(state) for p, state in optimizer.state.items()}
    state = optimizer.state_dict()
    assert {p: dict(s) for p, s in optimizer.state.items()}.keys() == before.keys()
    assert all(s.keys() == before[p].keys() for p, s in optimizer.state.items())
    frozen = copy.deepcopy(state)
    if loaded_first and not allocator_first:
        with pytest.raises(fastpeft.CheckpointError, match="make the RankAllocator first"):
            build(state)
        return
    twin, other_optimizer, other = build(state if loaded_first else None)
    twin.load_state_dict(model.state_dict())
    if not loaded_first:
        other_optimizer.load_state_dict(copy.deepcopy(state))
    ranks = [
        layer.specs["default"].ranks for layer in (next(iter(adapter_layers(m)))[1] for m in (model, twin))
    ]
    assert ranks[0].scores.keys() == ranks[1].scores.keys()
    for name, pair in ranks[0].scores.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, ranks[1].scores[name], strict=True))
    assert train(model, optimizer, 8, 20) == train(twin, other_optimizer, 8, 20)
    assert allocator.pattern == other.pattern
    assert state["param_groups"] == frozen["param_groups"], "a state that was taken stays as it was"


def test_without_an_optimiser():
    """In people's own loops; the state is saved by hand."""

    def run(stop):
        model, optimizer, allocator = make()
        allocator.remove()
        torch.manual_seed(8)

        def allocate(step):
            fastpeft.update_and_allocate(model, step)

        losses = train(model, optimizer, 0, stop, allocate)
        state = copy.deepcopy(RankAllocator(model).state_dict())
        ranks = next(iter(adapter_layers(model)))[1].specs["default"].ranks
        ranks.pattern, ranks.scores = {}, {}  # as in a model that is made anew
        RankAllocator(model).load_state_dict(state)
        losses += train(model, optimizer, stop, 24, allocate)
        return losses, RankAllocator(model).pattern

    assert run(24) == run(9) == run(20)


def test_scaled_gradients():
    """A fused optimiser divides by the scale itself, and skips the step where one is not finite."""
    found = []
    for scale in (None, 1024.0):
        model = ours(llama, **RUN).train()
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3, fused=True)
        allocator = RankAllocator(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(4):
            scaler.scale(model(**batch(step)).loss).backward()
            if scale is not None and step == 2:
                kept = trained(model)[0].grad.clone()
                trained(model)[0].grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update(scale)
                assert allocator.steps == step, "a skipped step is none"
                trained(model)[0].grad.copy_(kept)
            scaler.step(optimizer)
            scaler.update(scale)
            optimizer.zero_grad()
        assert allocator.steps == 4
        found.append(next(iter(adapter_layers(model)))[1].specs["default"].ranks.scores)
    for name, pair in found[0].items():
        for mine, expected in zip(found[1][name], pair, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-9, msg=name)


def test_what_does_not_train_keeps_its_scores():
    """Under IST a parameter without a gradient is scored no further, and is not forgotten."""
    model = ours(llama, **RUN).train()
    optimizer = LayerSparseAdamW(model, 5e-3, schedule=IST(layers=1, update_every=2))
    allocator = RankAllocator(model, optimizer)
    ranks = next(iter(adapter_layers(model)))[1].specs["default"].ranks
    seen = set()
    for step in range(18):
        before = {name: pair[0].clone() for name, pair in ranks.scores.items()}
        (active,) = optimizer.active_blocks
        train(model, optimizer, step, step + 1)
        seen.add(active)
        for name, (sensitivity, _) in ranks.scores.items():
            trains = name.startswith(f"{active}.")
            if name in before and not trains:
                assert torch.equal(sensitivity, before[name]), name
            if trains and name.endswith("lora_B") and step > 2:
                assert name not in before or not torch.equal(sensitivity, before[name]), name
        assert {
            name.rpartition(".self_attn")[0] or name.rpartition(".mlp")[0] for name in ranks.scores
        } == seen
        if step < 3:
            assert any(optimizer.sparse.scores) == (step >= 1)
    train(model, optimizer, 18, 24)
    assert sum(map(sum, allocator.pattern.values())) == 2 * LAYERS
    assert len(seen) == 2


def test_suppressed_adapters_and_never_trained_ones():
    model = ours(llama, **RUN).train()
    optimizer = LayerSparseAdamW(
        model, 5e-3, schedule=fastpeft.TopK(layers=1), blocks=["model.layers.0", "model.layers.1"]
    )
    allocator = RankAllocator(model, optimizer)
    train(model, optimizer, 0, 24)
    pattern = allocator.pattern
    assert not any(any(kept) for path, kept in pattern.items() if ".layers.0." in path)
    assert sum(sum(kept) for kept in pattern.values()) == 2 * LAYERS


def test_update_of_scores_by_hand():
    weight = nn.Parameter(torch.tensor([[2.0, -1.0]]))
    parameters = {"a": {"lora_A": weight, "lora_E": nn.Parameter(torch.ones(1, 1)),
                        "lora_B": nn.Parameter(torch.ones(3, 1))}}  # fmt: skip
    ranks = Ranks()
    assert scores.update_scores(ranks, parameters, (0.5, 0.25)) == 0
    weight.grad = torch.tensor([[0.5, 3.0]])
    assert scores.update_scores(ranks, parameters, (0.5, 0.25)) == 1
    sensitivity, uncertainty = ranks.scores["a.lora_A"]
    assert torch.equal(sensitivity, torch.tensor([[0.5, 1.5]]))
    assert torch.equal(uncertainty, 0.75 * torch.tensor([[0.5, 1.5]]))
    found = scores.triplet_scores(ranks, parameters)
    assert torch.equal(found, torch.tensor([0.75 * (0.25 + 2.25) / 2]))


def test_refusals_change_nothing(tmp_path):
    plain = fastpeft.patch(llama(), fastpeft.LoRA(r=2))
    with pytest.raises(fastpeft.PatchError, match="expected a model with one AdaLoRA adapter, got one with"):
        RankAllocator(plain)
    with pytest.raises(fastpeft.PatchError, match="is not patched"):
        fastpeft.update_and_allocate(llama(), 0)
    model = ours(llama, **RUN).train()
    with pytest.raises(fastpeft.PatchError, match="no parameter of 'default' has a gradient"):
        fastpeft.update_and_allocate(model, 0)
    with pytest.raises(fastpeft.PatchError, match="step 18 allocates by scores, and there are none"):
        fastpeft.update_and_allocate(model, 18)
    with pytest.raises(fastpeft.PatchError, match="step 20 is after the last allocation, at 18"):
        fastpeft.update_and_allocate(model, 20)
    with pytest.raises(fastpeft.ConfigError, match="step: expected a whole number of at least 0, got -1"):
        fastpeft.update_and_allocate(model, -1)
    some = torch.optim.AdamW(trained(model)[1:], lr=1e-3)
    with pytest.raises(fastpeft.PatchError, match=r"does not have model.layers.0.self_attn.q_proj.lora_A"):
        RankAllocator(model, some)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    unrecorded = optimizer.state_dict()
    allocator = RankAllocator(model, optimizer)
    with pytest.raises(fastpeft.PatchError, match="the optimizer has one already"):
        RankAllocator(model, optimizer)
    train(model, optimizer, 0, 6)
    fastpeft.save_training(model, optimizer, tmp_path)
    pattern, values = allocator.pattern, [p.clone() for p in model.parameters()]
    with pytest.raises(fastpeft.CheckpointError, match="saved without a RankAllocator"):
        optimizer.load_state_dict(unrecorded)
    other = ours(llama, **{**RUN, "tfinal": 5}).train()
    other_optimizer = torch.optim.AdamW(trained(other), lr=1e-3)
    RankAllocator(other, other_optimizer)
    with pytest.raises(fastpeft.CheckpointError, match="tfinal: 6 in the state, 5 here"):
        fastpeft.load_training(other, other_optimizer, tmp_path)
    late = torch.optim.AdamW(trained(other), lr=1e-3)
    late.load_state_dict(optimizer.state_dict())
    with pytest.raises(fastpeft.CheckpointError, match="tfinal: 6 in the state, 5 here"):
        RankAllocator(other, late)
    with pytest.raises(fastpeft.CheckpointError, match="scores of other parameters: x"):
        allocator.load_state_dict({**allocator.state_dict(), "scores": {"x": [torch.ones(1)] * 2}})
    assert (allocator.pattern, allocator.steps) == (pattern, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))
    allocator.remove()
    assert "adalora" not in optimizer.param_groups[0]
    RankAllocator(model, optimizer).remove()


def test_fsdp2_in_two_processes_allocates_as_one_process_does(tmp_path):
    command = [sys.executable, "-m", "tests.fsdp2_adalora_worker", str(tmp_path / "store")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT, **pipes) for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    assert all("same ranks" in output for output in outputs), outputs


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=24, learning_rate=5e-3,
        report_to=[], logging_steps=1, disable_tqdm=True, seed=1, use_cpu=True, **options,
    )  # fmt: skip


def test_in_a_trainer_and_resumed(tmp_path):
    ids = torch.randint(0, VOCABULARY, (48, 9), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": row, "labels": row} for row in ids]

    def run(folder, resume=None):
        callback = RankAllocatorCallback()
        trainer = Trainer(
            model=ours(llama, **RUN),
            args=arguments(folder, save_steps=9, save_strategy="steps"),
            train_dataset=dataset,
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return trainer.model, losses, callback.allocator

    model, losses, allocator = run(tmp_path / "a")
    assert allocator.steps == 24
    assert sum(map(sum, allocator.pattern.values())) == 2 * LAYERS
    again, tail, other = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-9"))
    assert tail[-15:] == losses[-15:]
    assert other.pattern == allocator.pattern
    assert same(model, again)
