"""Models whose modules are shared, repeated, partly retrained or called with other parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

import fastpeft
from tests.in_place.cases import assert_same_as_peft, peft_model, run
from tests.models import llama, tokens

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "v_proj", "up_proj"]
SOME = tokens()[0, :3].tolist()


def tied(dtype):
    return llama(dtype, tied=True)


OPTIONS = {
    "trainable-tokens": (llama, {"trainable_token_indices": {"embed_tokens": SOME}}),
    "trainable-tokens-tied": (tied, {"trainable_token_indices": SOME}),
    "tied-embedding": (tied, {"target_modules": ["embed_tokens", *TARGETS]}),
    "tied-saved": (tied, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "layers-repeated": (llama, {"layer_replication": [[0, 2], [1, 2]]}),
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("base", "options"), OPTIONS.values(), ids=OPTIONS)
def test_like_peft(base, options, use_dora):
    untouched = peft_model(base=base, **{"target_modules": TARGETS, **options, "use_dora": use_dora})
    with torch.no_grad():
        for name, parameter in untouched.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    patched = copy.deepcopy(untouched)
    pointers = [p.data_ptr() for p in patched.parameters()]
    fastpeft.patch(patched)
    assert [p.data_ptr() for p in patched.parameters()] == pointers  # what is shared stays so
    assert_same_as_peft(patched, untouched)
    report = fastpeft.report(patched)
    assert report.calls["fused"] > 0
    assert not report.reasons


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_tied_weights_are_tied(use_dora):
    """PEFT ties them by tensors that cannot be copied, so there are two models from the start."""
    targets = ["embed_tokens", "lm_head", *TARGETS]
    patched, untouched = (
        peft_model(base=tied, target_modules=targets, ensure_weight_tying=True, use_dora=use_dora)
        for _ in range(2)
    )
    fastpeft.patch(patched)
    ours, theirs = run(patched), run(untouched)
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        torch.testing.assert_close(result, theirs[name], rtol=1e-3, atol=1e-5, msg=name)
    assert not fastpeft.report(patched).reasons


def test_repeated_layers_share_a_base_and_have_norms_of_their_own():
    model = fastpeft.patch(
        peft_model(target_modules=TARGETS, layer_replication=[[0, 2], [1, 2]], use_dora=True)
    )
    layers = model.base_model.model.model.layers
    first, again = layers[1].self_attn.q_proj, layers[2].self_attn.q_proj
    assert first.base_layer.weight is again.base_layer.weight
    x = torch.randn(3, 32)
    y = first(x)
    assert not torch.allclose(y, again(x))
    assert torch.equal(first(x), y)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_functional_call(use_dora):
    """Other parameters for one call, the base's too: no norm of the model's own is taken for theirs."""
    untouched = peft_model(use_dora=use_dora)
    patched = fastpeft.patch(copy.deepcopy(untouched))
    own = patched(tokens()).logits
    torch.manual_seed(2)
    other = {name: p.detach() * (torch.rand_like(p) + 0.5) for name, p in patched.named_parameters()}
    found = [functional_call(model, other, (tokens(),)).logits for model in (patched, untouched)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], own, rtol=1e-2)
    assert torch.equal(patched(tokens()).logits, own)

    def loss(parameters, model):
        return functional_call(model, parameters, kwargs={"input_ids": tokens(), "labels": tokens()}).loss

    trained = {name: other[name] for name, p in patched.named_parameters() if p.requires_grad}
    gradients = [torch.func.grad(loss)(trained, model) for model in (patched, untouched)]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)
    assert not fastpeft.report(patched).reasons
