"""What an accelerated PEFT model carries along: which way its calls went, and each layer's norms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastpeft.layers.norm_cache import NormCache

# fused: base product and adapter in one op. added: the base's own product, our update on it. base: nothing to
# add (merged, disabled, no active adapter). peft: PEFT's own forward.
Route = Literal["fused", "added", "base", "peft"]
LAYER_ATTRIBUTE = "_fastpeft_layer"
MODEL_ATTRIBUTE = "_fastpeft_in_place"
_NORM_ATTRIBUTE = "_fastpeft_norm"


@dataclass
class Calls:
    """How often the layers of one model went which way, and why PEFT's; not under compilation.

    ``on_new_layers`` is called with a model in which PEFT has made layers since, ``on_none_left`` with one
    that PEFT has taken all its layers out of.
    """

    routes: Counter[Route] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    on_new_layers: Callable[[nn.Module], None] | None = None
    on_none_left: Callable[[nn.Module], None] | None = None

    def count(self, route: Route, reason: str | None = None) -> None:
        """Note one call."""
        if not torch.compiler.is_compiling():
            self.routes[route] += 1
            if reason is not None:
                self.reasons[reason] += 1


@dataclass
class Layer:
    """One accelerated module: the record of its model, and DoRA's row norms by adapter.

    A norm's cache hangs on PEFT's module of the adapter's magnitude, so it goes when PEFT deletes the
    adapter.
    """

    calls: Calls
    module: nn.Module
    # (siblings, own name) where it may be computed together with others of its parent (fastpeft.blocks).
    siblings: Any = None
    # What the adapters' outputs are multiplied by for the moment (fastpeft.sparse.suppression).
    response: Tensor | None = None

    def norm_cache(self, adapter: str) -> NormCache:
        """Return the cache of a DoRA adapter's row norm."""
        magnitudes: Any = self.module._modules["lora_magnitude_vector"]
        holder: dict[str, Any] = magnitudes._modules[adapter].__dict__
        cache: NormCache | None = holder.get(_NORM_ATTRIBUTE)
        if cache is None:
            cache = holder[_NORM_ATTRIBUTE] = NormCache()
        return cache

    def forget_norms(self) -> None:
        """Take the caches off PEFT's modules."""
        magnitudes = self.module._modules.get("lora_magnitude_vector")
        for magnitude in magnitudes.children() if magnitudes is not None else ():
            magnitude.__dict__.pop(_NORM_ATTRIBUTE, None)
