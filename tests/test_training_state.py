"""A training saved and gone on with: to the bit in a new process, whole after a kill, or refused."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpeft
from fastpeft import LISA, BAdam, LayerSparseAdamW, training_folder
from fastpeft.errors import CheckpointError, LayerSparseError
from tests import training_worker
from tests.test_layer_sparse import SCHEDULES, llama, model_for, patched, train

WORKER = [sys.executable, "-m", "tests.training_worker"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parent.parent


def go(folder, first, steps):
    command = [*WORKER, "go", str(folder), str(first), str(steps)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_new_process_goes_on_to_the_bit(tmp_path):
    """In the middle of an interval, with dropout's random numbers and the learning rate's schedule."""
    assert go(tmp_path / "a", 0, 4) + go(tmp_path / "a", 4, 4) == go(tmp_path / "b", 0, 8)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_every_schedule_goes_on_to_the_bit(tmp_path, schedule, policy):
    def make():
        model = model_for(schedule, torch.bfloat16)
        return model, LayerSparseAdamW(model, 1e-2, 0.1, schedule, policy, master_weights=True)

    whole, optimizer = make()
    losses = train(whole, optimizer, 8)
    first, optimizer = make()
    head = train(first, optimizer, 5)
    fastpeft.save_training(first, optimizer, tmp_path)
    second, optimizer = make()
    assert fastpeft.load_training(second, optimizer, tmp_path) == {}
    assert head + train(second, optimizer, 3, first=5) == losses
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad == b.requires_grad


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_any_torch_optimizer_goes_on_to_the_bit(tmp_path, make):
    def fresh():
        model = llama().train()
        return model, make(model.parameters(), 0.05, weight_decay=0.1)

    model, optimizer = fresh()
    losses = train(model, optimizer, 2)
    fastpeft.save_training(model, optimizer, tmp_path)
    losses = train(model, optimizer, 2, first=2)
    model, optimizer = fresh()
    fastpeft.load_training(model, optimizer, tmp_path)
    assert train(model, optimizer, 2, first=2) == losses


def test_only_what_trains_is_written(tmp_path):
    model = patched()
    optimizer = LayerSparseAdamW(model, 1e-2, schedule=LISA(2, 3))
    train(model, optimizer, 1)
    fastpeft.save_training(model, optimizer, tmp_path)
    written = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    adapters = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n)
    assert adapters < written < 2 * adapters + 40_000  # with headers and random numbers
    assert adapters + 30_000 < sum(p.nbytes for p in model.parameters())
    optimizer.zero_grad()
    fastpeft.save_training(model, optimizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # nothing of the save before is left


def test_a_kill_in_a_save_loses_nothing_but_the_step(tmp_path):
    draw = random.Random(0)
    for _ in range(4):
        folder = tmp_path / "state"
        shutil.rmtree(folder, ignore_errors=True)
        worker = subprocess.Popen(
            [*WORKER, "save", str(folder)], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        for _ in range(draw.randint(1, 6)):
            assert worker.stdout.readline() == "saved\n"
        try:
            worker.wait(draw.random() * 0.05)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        worker.stdout.close()
        model, optimizer, scheduler = training_worker.make()
        step = fastpeft.load_training(model, optimizer, folder, scheduler=scheduler)["step"]
        whole, its_optimizer, its_scheduler = training_worker.make()
        torch.manual_seed(3)
        training_worker.train(whole, its_optimizer, its_scheduler, 0, step)
        for a, b in zip(whole.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert its_optimizer.active_blocks == optimizer.active_blocks
        fastpeft.save_training(model, optimizer, folder, scheduler=scheduler)
        assert len(list(folder.iterdir())) == 2  # what the kill left is cleared away


def saved(folder):
    model = llama().train()
    optimizer = LayerSparseAdamW(model, 1e-2, schedule=LISA(2, 5))
    train(model, optimizer, 2)
    return fastpeft.save_training(model, optimizer, folder)


def refusal(folder, model, optimizer, error, text):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(error, match=text):
        fastpeft.load_training(model, optimizer, folder)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert trains == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not optimizer.state


def test_a_state_of_another_training_is_refused_and_changes_nothing(tmp_path):
    saved(tmp_path)
    for make, schedule, error, text in (
        (llama, BAdam(), LayerSparseError, "kind: 'LISA' in the file, 'BAdam' here"),
        (lambda: llama(layers=4), LISA(2, 5), LayerSparseError, "blocks in the file only: model.layers.4"),
        (patched, LISA(2, 5), LayerSparseError, "parameters here only"),
        (lambda: llama(torch.bfloat16), LISA(2, 5), CheckpointError, "float32.* in the file.*bfloat16"),
    ):
        model = make()
        refusal(tmp_path, model, LayerSparseAdamW(model, schedule=schedule), error, text)
    model = llama()
    refusal(tmp_path, model, torch.optim.AdamW(model.parameters()), LayerSparseError, "no schedule")
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = LayerSparseAdamW(model, schedule=LISA(2, 5), params=groups)
    refusal(tmp_path, model, optimizer, CheckpointError, "other parameter groups")


def test_a_damaged_folder_gives_one_error_and_changes_nothing(tmp_path):
    whole = saved(tmp_path / "whole")

    def damaged(change):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        change(folder)
        model = llama()
        refusal(folder, model, LayerSparseAdamW(model, schedule=LISA(2, 5)), CheckpointError, "load: ")

    def cut(file):
        os.truncate(file, file.stat().st_size // 2)

    damaged(lambda folder: (folder / "training.pt").unlink())
    damaged(lambda folder: cut(folder / "training.pt"))
    damaged(lambda folder: torch.save([1], folder / "training.pt"))
    damaged(lambda folder: torch.save({"part": "../whole", "rest": {}}, folder / "training.pt"))
    damaged(lambda folder: torch.save({"part": "tensors-" + "0" * 16, "rest": {}}, folder / "training.pt"))
    damaged(lambda folder: (folder / "training.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR."))
    damaged(lambda folder: [cut(f) for f in folder.rglob("*.safetensors")])
    damaged(lambda folder: [f.unlink() for f in folder.rglob("*.safetensors")])
    damaged(lambda folder: [shutil.rmtree(f) for f in folder.glob("tensors-*")])
    with pytest.raises(CheckpointError, match=r"has no training\.pt"):
        fastpeft.load_training(llama(), torch.optim.AdamW(llama().parameters()), tmp_path / "nowhere")


def test_what_cannot_be_saved_leaves_the_old_state(tmp_path):
    saved(tmp_path)
    before = {f.relative_to(tmp_path) for f in tmp_path.rglob("*")}
    model = llama()
    optimizer = LayerSparseAdamW(model, schedule=LISA(2, 5))
    with pytest.raises(CheckpointError, match=r"\['extra'\]\['loader'\].*got object"):
        fastpeft.save_training(model, optimizer, tmp_path, extra={"loader": object()})
    with pytest.raises(CheckpointError, match="none of LlamaForCausalLM's"):
        fastpeft.save_training(model, torch.optim.AdamW(llama().parameters()), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        fastpeft.save_training(model, optimizer, tmp_path / "file")
    (tmp_path / "file").unlink()
    assert {f.relative_to(tmp_path) for f in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("stage", ["flush", "replace"])
def test_a_save_that_fails_leaves_the_old_state(tmp_path, monkeypatch, stage):
    saved(tmp_path)
    model = llama().train()
    optimizer = LayerSparseAdamW(model, 1e-2, schedule=LISA(2, 5))
    train(model, optimizer, 4)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((training_folder, stage) if stage == "flush" else (Path, stage)), fail)
    with pytest.raises(CheckpointError, match="No space left"):
        fastpeft.save_training(model, optimizer, tmp_path)
    monkeypatch.undo()
    fresh = LayerSparseAdamW(model, 1e-2, schedule=LISA(2, 5))
    fastpeft.load_training(model, fresh, tmp_path)
    assert fresh.sparse.steps == 2
    fastpeft.save_training(model, fresh, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_torchs_own_state_dict_verbs():
    """They make state by a step of their own, and want to know who trains before the state comes."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def make():
        model = llama().train()
        return model, LayerSparseAdamW(model, 1e-2, schedule=LISA(2, 2, seed=2))

    model, optimizer = make()
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.sparse.steps == 0
    train(model, optimizer, 3)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights = copy.deepcopy(model.state_dict())
    losses = train(model, optimizer, 2, first=3)
    fresh, again = make()
    assert again.active_blocks != tuple(optimizer.sparse.record["active"])
    again.sparse.resume(state["param_groups"][0]["layer_sparse"])
    set_optimizer_state_dict(fresh, again, state)
    fresh.load_state_dict(weights)
    assert train(fresh, again, 2, first=3) == losses
    with pytest.raises(LayerSparseError, match="period: 5 in the file"):
        again.sparse.resume(LayerSparseAdamW(llama(), schedule=LISA(2, 5, seed=2)).sparse.record)
