"""A patched model inside transformers' Trainer: the README's example, with checkpointing and resumption."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import fastpeft
from tests.models import llama, tokens


def train(model, folder, *, steps: int, resume: bool = False) -> Trainer:
    examples = [{"input_ids": row, "labels": row} for row in tokens(batch=16)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=6,
        use_cpu=True,
        bf16=True,
        eval_strategy="steps",
        eval_steps=6,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def evaluations(trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def loss(model) -> float:
    with torch.no_grad():
        return model.eval()(tokens(batch=16), labels=tokens(batch=16)).loss.item()


def test_trainer_trains_checkpoints_and_resumes(tmp_path):
    config = fastpeft.LoRA(r=4, use_dora=True)
    model = fastpeft.patch(llama(), config)
    before = loss(model)
    whole = evaluations(train(model, tmp_path, steps=12))
    assert whole[1] < whole[0]
    assert loss(model) < before - 0.05
    resumed = fastpeft.patch(llama(), config)
    (tmp_path / "checkpoint-12").rename(tmp_path / "gone")
    trainer = train(resumed, tmp_path, steps=12, resume=True)
    assert trainer.state.global_step == 12
    assert evaluations(trainer) == pytest.approx(whole, rel=1e-3)
    torch.testing.assert_close(loss(resumed), loss(model), rtol=1e-3, atol=1e-3)
    fastpeft.save(model, tmp_path / "adapter")
    loaded = fastpeft.load(llama(), tmp_path / "adapter").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
