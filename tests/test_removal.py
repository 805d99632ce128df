"""IST's greedy removal: planted importance is found, and the model is left as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft import LoRA, PrefixTuning, SeriesAdapter, VeRA
from fastpeft.errors import LayerSparseError
from fastpeft.instruments import greedy_removal, random_removal
from tests.models import tokens
from tests.test_layer_sparse import llama


class Residual(nn.Module):
    """x + proj(x): adapters of different blocks nearly add up."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.proj(x)


HARM = (0.5, -0.3, 3.0, 0.1, -2.0)  # what taking each block's adapter away adds to the loss


def planted():
    """Blocks whose adapter adds a known number to the one output that the loss reads.

    Block i adds ``HARM[i]`` to feature 1 from feature 0, which is 1 throughout; the loss is ``-feature 1``.
    """
    blocks = nn.Sequential(*(Residual(4) for _ in HARM))
    for p in blocks.parameters():
        nn.init.zeros_(p)
    model = fastpeft.patch(blocks, LoRA(r=1, lora_alpha=1))
    with torch.no_grad():
        for block, amount in zip(model, HARM, strict=True):
            block.proj.lora_A["default"].copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
            block.proj.lora_B["default"].copy_(torch.tensor([[0.0], [amount], [0.0], [0.0]]))
    return model


def planted_loss(model, x):
    assert not torch.is_grad_enabled()
    assert not model.training
    return -model(x)[:, 1].mean()


X = torch.tensor([[1.0, 0.0, 0.0, 0.0]])


def test_the_least_missed_go_first_and_the_curve_is_theirs():
    calls = []
    model = planted().train()
    found = greedy_removal(
        model,
        planted_loss,
        [X, X + torch.tensor([[0.0, 2.0, 0.0, 0.0]])],
        progress=lambda *c: calls.append(c),
    )
    order = sorted(range(5), key=lambda i: HARM[i])
    assert [int(name) for name in found.order] == order
    expected = [-sum(HARM) - 1.0]  # the second batch begins with 2, half of which is the mean
    for place in order:
        expected.append(expected[-1] + HARM[place])
    assert found.losses == pytest.approx(expected, abs=1e-6)
    assert calls == [(i, 16) for i in range(1, 17)]
    assert model.training


def test_only_some_and_at_random():
    model = planted()
    found = greedy_removal(model, planted_loss, [X], count=2)
    assert found.order == ("4", "1")
    assert len(found.losses) == 3
    calls = []
    drawn = random_removal(model, planted_loss, [X], seed=3, progress=lambda *c: calls.append(c))
    assert drawn == random_removal(model, planted_loss, [X], seed=3)
    assert sorted(drawn.order) == sorted((*found.order, "0", "2", "3"))
    assert len({random_removal(model, planted_loss, [X], seed=s).order for s in range(8)}) > 3
    assert calls[-1] == (6, 6)
    expected = -sum(HARM)
    for name, loss in zip(drawn.order, drawn.losses[1:], strict=True):
        expected += HARM[int(name)]
        assert loss == pytest.approx(expected, abs=1e-6)


def pefts(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", **options)
        return fastpeft.patch(get_peft_model(llama(layers=3), config))


MODELS = {
    "lora": lambda: fastpeft.patch(llama(layers=3), LoRA(r=2, init_lora_weights=False)),
    "dora": lambda: fastpeft.patch(llama(layers=3), LoRA(r=2, init_lora_weights=False, use_dora=True)),
    "vera": lambda: fastpeft.patch(llama(layers=3), VeRA(r=4, init_weights=False)),
    "series": lambda: fastpeft.patch(llama(layers=3), SeriesAdapter(bottleneck_size=3)),
    "peft": pefts,
    "peft-dora": lambda: pefts(use_dora=True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_without_all_adapters_it_is_the_base_and_then_the_model_again(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    ids = tokens(2, 9) % 32

    def loss(m, batch):
        return m(input_ids=batch, labels=batch).loss

    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    with torch.no_grad():
        whole = loss(model, ids)
        base = loss(llama(layers=3), ids)
    found = greedy_removal(model, loss, [ids])
    assert found.losses[0] == pytest.approx(whole.item(), rel=1e-6)
    assert found.losses[-1] == pytest.approx(base.item(), rel=1e-6)
    assert len(set(found.order)) == 3
    assert abs(whole - base) > 1e-4
    # Greedy is the least of all at its first step.
    firsts = [random_removal(model, loss, [ids], count=1, seed=s) for s in range(12)]
    assert found.losses[1] == min(f.losses[1] for f in firsts)
    with torch.no_grad():
        assert torch.equal(loss(model, ids), whole)
    assert model.training
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]
        assert p.grad is None


def test_a_loss_that_raises_leaves_the_model_as_it_was():
    model = planted().train()
    turns = iter(range(4))

    def fails(m, x):
        if next(turns) == 3:
            raise ZeroDivisionError
        return planted_loss(m, x)

    with pytest.raises(ZeroDivisionError):
        greedy_removal(model, fails, [X])
    assert model.training
    assert model(X)[0, 1].item() == pytest.approx(sum(HARM))


def test_wrong_use_is_one_error():
    model = planted()
    for call, said in (
        (
            lambda: greedy_removal(llama(), planted_loss, [X]),
            "no block of this LlamaForCausalLM has an adapter",
        ),
        (
            lambda: greedy_removal(
                fastpeft.patch(llama(), PrefixTuning(num_virtual_tokens=2)), planted_loss, [X]
            ),
            "no block of this LlamaForCausalLM has an adapter",
        ),
        (lambda: greedy_removal(model, planted_loss, []), "batches: expected at least one"),
        (lambda: greedy_removal(model, planted_loss, [X], count=6), "count: expected .* from 1 to 5, got 6"),
        (lambda: random_removal(model, planted_loss, [X], count=0), "count: expected"),
        (lambda: greedy_removal(model, lambda *_: float("nan"), [X]), "adapters of none is nan"),
        (lambda: random_removal(model, lambda *_: float("inf"), [X]), "adapters of none is inf"),
    ):
        with pytest.raises(LayerSparseError, match=said) as error:
            call()
        assert "\n" not in str(error.value)
