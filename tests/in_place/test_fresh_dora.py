"""A fresh DoRA adapter (B = 0, m = n) leaves an output as it is, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft.ops.row_norm import checked_row_scale, row_norm, row_norm_squared
from tests.tolerance import assert_within_rule

IN, OUT = 1000, 300  # long enough for a product to be summed in several parts, which the bias comes before


class Together(nn.Module):
    """Three linears that share their input, as an attention's do, each with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(IN, OUT) for _ in range(3))

    def forward(self, x):
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return torch.cat([q, k, v], dim=-1)


def fresh(model: nn.Module, **options) -> nn.Module:
    config = LoraConfig(use_dora=True, target_modules="all-linear", r=4, **options)
    # In the base's dtype, in which plain PyTorch is then measured.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Together() if kind == "siblings" else nn.Sequential(nn.Linear(IN, OUT, bias=kind != "no-bias"))


def inputs(dtype=torch.float32) -> torch.Tensor:
    return torch.rand(40, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["bias", "no-bias", "siblings", "hooked"])
def test_first_output_is_the_bases(kind, training):
    x = inputs()
    model = make(kind)
    expected = model(x).detach()
    model = fastpeft.patch(fresh(model, lora_dropout=0.3 if training else 0.0)).train(training)
    if kind == "hooked":
        for layer in model.modules():
            if hasattr(layer, "base_layer"):
                layer.base_layer.register_forward_hook(lambda *_: None)
    assert torch.equal(model(x), expected)
    report = fastpeft.report(model)
    assert not report.reasons
    assert report.calls == {"added" if kind == "hooked" else "fused": 3 if kind == "siblings" else 1}


@pytest.mark.parametrize("kind", ["bias", "siblings", "hooked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_gradients_are_dora_s(kind, dtype):
    """z, of which the magnitude's gradient is made, is there at the first step too."""
    untouched = fresh(make(kind).to(dtype))
    patched = fastpeft.patch(copy.deepcopy(untouched))
    exact = copy.deepcopy(untouched).double()
    dy = torch.randn(40, 3 * OUT if kind == "siblings" else OUT, generator=torch.Generator().manual_seed(2))
    dy = dy.to(torch.bfloat16)
    found = []
    for model in (patched, exact, untouched):
        for layer in model.modules():
            if kind == "hooked" and hasattr(layer, "base_layer"):
                layer.base_layer.register_forward_hook(lambda *_: None)
        x = inputs(torch.bfloat16).to(torch.float64 if model is exact else dtype)
        y = model(x)
        y.backward(dy.to(y.dtype))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), **gradients})
    assert sum("magnitude" in name for name in found[0]) == (3 if kind == "siblings" else 1)
    for name in found[0]:
        if found[1][name].any():
            assert_within_rule(*(each[name].double() for each in found), name)


def test_when_every_row_scale_is_one():
    torch.manual_seed(0)
    W, A, B = torch.randn(6, 5), torch.randn(2, 5), torch.zeros(6, 2)
    n = row_norm(W, A, B, 2.0, row_norm_squared(W))
    assert torch.equal(n, torch.linalg.vector_norm(W, dim=1))  # sqrt(n^2) is n again
    assert checked_row_scale(n.clone(), n).is_one
    for changed in (n * torch.tensor([1, 1, 1, 1, 1, -1]), n * torch.tensor([1, 1, 1, 1, 1, 1 + 2**-22])):
        assert not checked_row_scale(changed, n).is_one
        assert checked_row_scale(changed, n).is_quotient
