"""PEFT models of every kind that fastpeft accelerates in place, and how their results are compared."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import fastpeft
from tests.models import llama, tokens
from tests.tolerance import assert_within_rule

LINEAR = {"target_modules": "all-linear"}


def lora_config(**options: object) -> LoraConfig:
    """A configuration whose update is not zero from the start."""
    return LoraConfig(**{"r": 4, "init_lora_weights": False, **LINEAR, **options})


def peft_model(
    dtype: torch.dtype = torch.float32, *, base=llama, seed: int = 0, **options: object
) -> PeftModel:
    """A small random model with PEFT's adapters on it."""
    return with_adapters(base(dtype), [options], seed=seed)


def with_adapters(
    model: nn.Module,
    configs: list[dict[str, object]],
    *,
    names=("default", "other"),
    seed: int = 0,
    **how: object,
) -> PeftModel:
    """One adapter per set of options, all of them active."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a Conv1D is one, that a head is tied
        model = get_peft_model(model, lora_config(**configs[0]), **how)
        for name, options in zip(names[1:], configs[1:], strict=False):
            model.add_adapter(name, lora_config(**options))
    if len(configs) > 1:
        model.base_model.set_adapter(list(names[: len(configs)]))
    # Magnitudes start at the norm, where DoRA's factor is 1 and hides what it multiplies.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif ".lora_B." in name and name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def pair(**options) -> tuple[nn.Module, nn.Module]:
    """An accelerated model with two adapters, the first of them active, and the same one untouched."""
    model = with_adapters(llama(), [options, {"r": 4, "lora_alpha": 9, **options}])
    model.set_adapter("default")
    untouched = copy.deepcopy(model)
    return fastpeft.patch(model), untouched


def logits(model: nn.Module) -> Tensor:
    """Of the test's tokens, without gradients."""
    with torch.no_grad():
        return model(tokens()).logits


def run(model: nn.Module) -> dict[str, Tensor]:
    """Logits, and the gradients of everything that trains."""
    model.zero_grad()
    output = model(input_ids=tokens(), labels=tokens())
    if output.loss.requires_grad:
        output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_same_as_peft(patched: nn.Module, unpatched: nn.Module) -> None:
    """Layer by layer by the 2x rule against PEFT in fp64; PEFT in the model's dtypes is plain PyTorch.

    All layers' errors together, each tensor's scaled to norm 1: a ratio of a few elements' rounding errors
    would mean nothing. Through a whole model such errors grow as chance has it, so there the results are only
    held to be the same in kind and close.
    """
    exact = copy.deepcopy(unpatched).double()
    found = [_layers(model) for model in (patched, exact, unpatched)]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for kind in ("output", "gradients"):
        names = [name for name in found[0] if (name.endswith(" y")) is (kind == "output")]
        vectors = [torch.cat([f[n].double().flatten() / found[1][n].norm() for n in names]) for f in found]
        assert_within_rule(*vectors, kind)
    whole, plain = run(patched), run(unpatched)
    assert whole.keys() == plain.keys()
    for name, result in whole.items():
        assert result.dtype == plain[name].dtype, name
        loose = 1e-3 if result.dtype is torch.float32 and plain["logits"].dtype is torch.float32 else 0.2
        assert (result - plain[name]).norm() <= loose * plain[name].norm() + 1e-6, name


def _layers(model: nn.Module) -> dict[str, Tensor]:
    """The output and all gradients of every layer of PEFT's, each alone, for a random input and dY."""
    results: dict[str, Tensor] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        g = torch.Generator().manual_seed(len(path))
        weight = layer.get_base_layer().weight
        if hasattr(layer, "num_embeddings") or isinstance(layer.get_base_layer(), nn.Embedding):
            x, leaves = tokens(), []
        else:
            x = torch.randn(24, layer.in_features, generator=g).to(torch.bfloat16).to(weight.dtype)
            leaves = [x.requires_grad_()]
        y = layer(x)
        leaves += [p for p in layer.parameters() if p.requires_grad]
        dy = torch.randn(y.shape, generator=g).to(torch.bfloat16).to(y.dtype)
        gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
        named = [f"{path} {i}" for i in range(len(gradients))]
        results[f"{path} y"] = y.detach()
        results.update({n: t for n, t in zip(named, gradients, strict=True) if t is not None})
    return results
