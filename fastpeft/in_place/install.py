"""Put our forward on the LoRA layers of a PEFT model, and take it off again.

A layer keeps its class, Parameters, submodules and repr: only ``forward`` is set on the instance, as a
partial of a module-level function, so that a copied or pickled model still works. Layers that PEFT makes
later (``add_adapter``, ``load_adapter``) get it too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fastpeft.errors import PatchError
from fastpeft.in_place.adapters import is_replaced
from fastpeft.in_place.embedding import embedding_forward
from fastpeft.in_place.linear import linear_forward
from fastpeft.in_place.own_forward import put_forward, take_forward
from fastpeft.in_place.parameter import parameter_forward
from fastpeft.in_place.record import LAYER_ATTRIBUTE, MODEL_ATTRIBUTE, Calls, Layer
from fastpeft.ops.probability import follow, unfollow
from fastpeft.patch_report import ModuleReport, PatchReport

# PEFT's layers whose lora_A and lora_B are linears beside a base with a forward of its own.
_LINEARS = frozenset(
    {
        "AqlmLoraLinear",
        "AwqLoraLinear",
        "EetqLoraLinear",
        "GPTQLoraLinear",
        "HqqLoraLinear",
        "IncLoraLinear",
        "Linear",
        "Linear4bit",
        "Linear8bitLt",
        "TorchaoLoraLinear",
    }
)
_LORA = "peft.tuners.lora."
_ADALORA = "peft.tuners.adalora."


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of every layer of PEFT's, LoRA or not, each once."""
    owner = sys.modules.get("peft.tuners.tuners_utils")
    if owner is not None:
        yield from ((p, m) for p, m in model.named_modules() if isinstance(m, owner.BaseTunerLayer))


def is_peft(model: nn.Module) -> bool:
    """Whether the model is PEFT's or holds layers of PEFT's."""
    wrapper = type(model).__module__.partition(".")[0] == "peft"
    return wrapper or any(True for _ in tuner_layers(model))


def find_calls(model: nn.Module) -> Calls | None:
    """Return the record of a model that was accelerated as a whole."""
    return model.__dict__.get(MODEL_ATTRIBUTE)


def accelerate(
    model: nn.Module,
    on_new_layers: Callable[[nn.Module], None],
    on_none_left: Callable[[nn.Module], None],
) -> None:
    """Put our forward on every LoRA layer that can have it; on a model that has it, on new layers alone.

    Args:
        model: holds PEFT's layers.
        on_new_layers: is called with it now, and with the model that PEFT makes more layers in later.
        on_none_left: is called with the model that PEFT has taken its layers out of, merged or not.

    Raises:
        PatchError: no layer of the model is a LoRA layer.
    """
    layers = list(tuner_layers(model))
    if not any(_is_lora(layer) for _, layer in layers):
        kinds = sorted({type(layer).__name__ for _, layer in layers})
        raise PatchError(
            f"{type(model).__name__} holds no LoRA layer of PEFT's"
            + (f", only {', '.join(kinds)}" if kinds else "; add an adapter first, or patch its base model")
        )
    calls = find_calls(model) or Calls()
    accelerate_layers(model, calls)
    calls.on_new_layers, calls.on_none_left = on_new_layers, on_none_left
    model.__dict__[MODEL_ATTRIBUTE] = calls
    on_new_layers(model)
    _follow_new_layers()
    _follow_unloading()


def accelerate_layers(model: nn.Module, calls: Calls) -> None:
    """Put our forward on the LoRA layers inside ``model`` that can have it, and count their calls."""
    for _, layer in tuner_layers(model):
        _install(layer, calls)


def restore(model: nn.Module) -> None:
    """Give every layer PEFT's own forward back."""
    for _, layer in tuner_layers(model):
        if is_accelerated(layer):
            layer.__dict__[LAYER_ATTRIBUTE].forget_norms()
            take_forward(layer)
            del layer.__dict__[LAYER_ATTRIBUTE]
            for dropout in getattr(layer, "lora_dropout", nn.ModuleDict()).values():
                unfollow(dropout)
    forget(model)


def forget(model: nn.Module) -> bool:
    """Take our record off a model and what is inside; whether there was one."""
    found = [module for module in model.modules() if find_calls(module) is not None]
    for module in found:
        del module.__dict__[MODEL_ATTRIBUTE]
    return bool(found)


def is_accelerated(layer: nn.Module) -> bool:
    """Whether a layer's forward is ours now."""
    forward = layer.__dict__.get("forward")
    ours = (linear_forward, embedding_forward, parameter_forward)
    return isinstance(forward, functools.partial) and forward.func in ours


def report(model: nn.Module) -> PatchReport:
    """Return the state of every layer of PEFT's, and the ways that calls have gone so far."""
    calls = find_calls(model)
    assert calls is not None
    parameters = list(model.parameters())
    return PatchReport(
        modules=tuple(_module_report(path, layer) for path, layer in tuner_layers(model)),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
        calls=dict(calls.routes.items()),
        reasons=dict(calls.reasons.items()),
    )


def _module_report(path: str, layer: Any) -> ModuleReport:
    if not is_accelerated(layer):
        return ModuleReport(path, "left to PEFT", _why_not(layer) or "its forward was replaced")
    adapters = [f"{name}: {_kind_of(layer, name)}(r={layer.r[name]})" for name in layer.r]
    base = type(layer.get_base_layer()).__name__
    if _forward_for(layer) is parameter_forward:
        base = f"{base}.{layer.parameter_name}"
    return ModuleReport(path, "accelerated", f"{base} with {', '.join(adapters) or 'no adapter'}")


def _kind_of(layer: Any, name: str) -> str:
    if type(layer).__module__.startswith(_ADALORA):
        return "AdaLoRA"
    return "DoRA" if layer.use_dora.get(name) else "LoRA"


def is_linear_layer(layer: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA linears."""
    return _forward_for(layer) is linear_forward


def _is_lora(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith((_LORA, _ADALORA))


def _forward_for(layer: nn.Module) -> Callable[..., Any] | None:
    if not _is_lora(layer):
        return None
    name = type(layer).__name__
    if type(layer).__module__.startswith(_ADALORA):
        return linear_forward if name == "SVDLinear" else None
    if name == "ParamWrapper" and hasattr(layer, "get_delta_factors"):  # of PEFT 0.21 on
        return parameter_forward
    return linear_forward if name in _LINEARS else embedding_forward if name == "Embedding" else None


def _why_not(layer: nn.Module) -> str | None:
    """Why a layer is PEFT's own business, or None if it is not."""
    if _forward_for(layer) is None:
        return f"{type(layer).__module__}.{type(layer).__name__} has no fused forward"
    if is_replaced(layer) and not is_accelerated(layer):
        return "its forward was replaced by other code (an accelerate hook, for one)"
    return None


def _install(layer: nn.Module, calls: Calls) -> None:
    forward = _forward_for(layer)
    if forward is None or _why_not(layer) is not None:
        return
    if not is_accelerated(layer):
        put_forward(layer, forward)
        layer.__dict__[LAYER_ATTRIBUTE] = Layer(calls, layer)
    record: Layer = layer.__dict__[LAYER_ATTRIBUTE]
    record.calls = calls
    for dropout in getattr(layer, "lora_dropout", nn.ModuleDict()).values():
        follow(dropout)


def _follow_new_layers() -> None:
    """Let PEFT's one entry for new layers tell us of them; models that are not accelerated see no change."""
    tuner = sys.modules["peft.tuners.tuners_utils"].BaseTuner
    original = tuner.inject_adapter
    if getattr(original, "_fastpeft", False):
        return

    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = original(self, model, *args, **kwargs)
        if (calls := _calls_inside(model)) is not None:
            accelerate_layers(model, calls)
            if calls.on_new_layers is not None:
                calls.on_new_layers(model)
        return result

    inject_adapter._fastpeft = True  # type: ignore[attr-defined]
    tuner.inject_adapter = inject_adapter


def _follow_unloading() -> None:
    """Let PEFT's two ways to take its layers out of a model, merged or not, tell us of it."""
    kinds: list[Any] = [sys.modules["peft.tuners.tuners_utils"].BaseTuner]
    for kind in kinds:
        kinds += kind.__subclasses__()
        for name in ("merge_and_unload", "unload"):  # of PEFT's versions some have them in each tuner
            original = kind.__dict__.get(name)
            if original is not None and not getattr(original, "_fastpeft", False):
                setattr(kind, name, _followed(original))


def _followed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def unloading(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls = _calls_inside(self.model)
        result = original(self, *args, **kwargs)
        if calls is not None and isinstance(result, nn.Module) and not is_peft(result):
            if calls.on_none_left is not None:
                calls.on_none_left(result)
            forget(result)
        return result

    unloading._fastpeft = True  # type: ignore[attr-defined]
    return unloading


def _calls_inside(model: nn.Module) -> Calls | None:
    """Return the record that a model's accelerated layers count their calls in, if there are such layers."""
    layers = (layer for _, layer in tuner_layers(model) if is_accelerated(layer))
    return next((layer.__dict__[LAYER_ATTRIBUTE].calls for layer in layers), None)
