"""What is done to a patched model in between: blocks inside blocks, casts by swapping, removal, folders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from tests.models import llama, tokens


def warmed(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with an update that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def patched(base: nn.Module | None = None, **options: object) -> nn.Module:
    model = llama() if base is None else base
    return warmed(fastpeft.patch(model, fastpeft.LoRA(**{"r": 4, **options})))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


# --- blocks inside blocks


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_a_mixed_batch_inside_another_gives_its_rows_back(fails):
    model = patched().eval()
    warmed(fastpeft.add_adapter(model, "two", fastpeft.LoRA(r=4)), seed=9)
    rows = len(tokens())
    alone = logits(model)
    with fastpeft.mixed_batch(model, ["two"] * rows):
        before = logits(model)
        try:
            with fastpeft.mixed_batch(model, ["default"] * rows):
                torch.testing.assert_close(logits(model), alone)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert torch.equal(logits(model), before)
    assert not torch.allclose(before, alone)
    assert torch.equal(logits(model), alone)


def test_adapters_disabled_inside_a_block_that_disables_them_stay_so():
    model = patched().eval()
    with fastpeft.disable_adapters(model):
        before = logits(model)
        with fastpeft.disable_adapters(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before)
