"""PEFT models accelerated in place and plain ones in transformers' Trainer and Accelerate: PEFT's losses."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
import warnings
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastpeft
from tests.in_place.cases import peft_model
from tests.models import llama, tokens
from tests.tolerance import assert_within_rule

ROWS = [{"input_ids": row, "labels": row} for row in tokens(batch=16)]
methods = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
ways = pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "plain"])


@pytest.fixture(autouse=True)
def _quiet():
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    # torch_compile=True leaves variables and a state by which Accelerate compiles whatever follows.
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)


class FirstGradient(TrainerCallback):
    """Keeps the gradient that the first step is made of, in one vector."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.found:
            return
        gradients = {
            name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        self.found.append(torch.cat([gradients[name].flatten().clone() for name in sorted(gradients)]))


def train(model, folder, *, steps: int = 4, resume: bool = False, **options) -> dict[str, list[Any]]:
    """The losses of every step, those of every evaluation, and the first gradient."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    first = FirstGradient()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[first]
    )
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    logged = {name: [e[name] for e in history if name in e] for name in ("loss", "eval_loss", "grad_norm")}
    return {**logged, "gradient": first.found}


def ours(use_dora: bool, in_place: bool) -> nn.Module:
    """What PEFT's model computes, accelerated in place or read from its file into a plain model."""
    theirs = peft_model(use_dora=use_dora)
    if in_place:
        return fastpeft.patch(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return fastpeft.load(llama(), folder)


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "bf16-evaluation": {"bf16": True, "eval_strategy": "steps", "eval_steps": 2},
}


@functools.cache
def pefts(use_dora: bool, loop: str) -> dict[str, list[Any]]:
    """What PEFT's own model gives in a loop."""
    model, options = peft_model(use_dora=use_dora), LOOPS[loop]
    if "gradient_checkpointing" in options:
        model.enable_input_require_grads()
    with tempfile.TemporaryDirectory() as folder:
        return train(model, folder, **options)


def assert_alike(found: dict[str, list[Any]], expected: dict[str, list[Any]], rel: float) -> None:
    assert len(expected["loss"]) == 4
    for name in ("loss", "eval_loss", "grad_norm"):
        assert found[name] == pytest.approx(expected[name], rel=rel), name


def assert_alike_in_bf16(found: dict[str, list[Any]], use_dora: bool, loop: str) -> None:
    """Losses to rounding; the first gradient by the 2x rule, against fp32's."""
    expected, exact = pefts(use_dora, loop), pefts(use_dora, "plain")
    for name in ("loss", "eval_loss"):
        assert found[name] == pytest.approx(expected[name], rel=2e-2), name
    gradients = (each["gradient"][0] for each in (found, exact, expected))
    assert_within_rule(*gradients, "first gradient")


@ways
@methods
@pytest.mark.parametrize("loop", LOOPS)
def test_losses_are_pefts(use_dora, in_place, loop, tmp_path):
    model = ours(use_dora, in_place)
    if "gradient_checkpointing" in LOOPS[loop]:
        model.enable_input_require_grads()
    before = copy.deepcopy(model.state_dict())
    found = train(model, tmp_path, **LOOPS[loop])
    assert len(found["eval_loss"]) == (2 if "evaluation" in loop else 0)
    if "bf16" in loop:
        assert_alike_in_bf16(found, use_dora, loop)
    else:
        assert_alike(found, pefts(use_dora, loop), 1e-3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained
    assert not fastpeft.report(model).reasons


@ways
@methods
def test_resumes(use_dora, in_place, tmp_path):
    model = ours(use_dora, in_place)
    again = copy.deepcopy(model)
    whole = train(model, tmp_path, eval_strategy="steps", eval_steps=2)
    (tmp_path / "checkpoint-4").rename(tmp_path / "gone")
    resumed = train(again, tmp_path, resume=True, eval_strategy="steps", eval_steps=2)
    for name in ("loss", "eval_loss"):
        assert resumed[name] == pytest.approx(whole[name], rel=1e-5), name


@ways
@methods
def test_compiled(use_dora, in_place, tmp_path):
    torch._dynamo.reset()
    model = ours(use_dora, in_place)
    how = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    found = train(model, tmp_path, **how, **LOOPS["evaluation"])
    assert_alike(found, pefts(use_dora, "evaluation"), 1e-3)
    assert not fastpeft.report(model).reasons


def accelerated(model: nn.Module) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    losses = []
    for step in range(6):
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens(length=5 + step), labels=tokens(length=5 + step)).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@ways
@methods
def test_accelerate(use_dora, in_place):
    expected = accelerated(peft_model(use_dora=use_dora))
    assert accelerated(ours(use_dora, in_place)) == pytest.approx(expected, rel=1e-3)


@methods
def test_functional_calls_and_transforms(use_dora):
    results = []
    for model in (ours(use_dora, True), peft_model(use_dora=use_dora)):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def loss(parameters, model=model):
            return torch.func.functional_call(model, parameters, (tokens(),), {"labels": tokens()}).loss

        results.append(torch.func.grad(loss)({n: p.detach() for n, p in trained.items()}))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-5)
