"""The weight that a layer and its active adapters amount to, ``W' = c (W + s B A)``, and its norms.

For layers that fastpeft patched and for PEFT's LoRA layers alike, as they stand: inactive, disabled and
merged adapters add nothing (a merged one is in the weight already). Dropout plays no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import ConfigError
from fastpeft.in_place.adapters import read
from fastpeft.in_place.install import is_linear_layer, tuner_layers
from fastpeft.in_place.linear import base_weight
from fastpeft.layers.adapted import Adapter, with_one_adapter
from fastpeft.layers.kinds import is_conv1d_like
from fastpeft.layers.merging import BLOCK_ELEMENTS, merged_weight
from fastpeft.methods.linears import adapter_layers
from fastpeft.ops._common import accumulation_dtype
from fastpeft.ops.row_norm import row_norm_squared, row_scale


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight with adapters.

    Attributes:
        weight: returns W [out_features, in_features] as numbers; of an embedding, its transpose.
        before: the same before there were adapters: another one where they were merged into it, or where
            their initialisation took a part out of it.
        adapters: the active ones, in forward's order.
        own: the layer's Parameters that are in it: the weight, and those of all adapters.
    """

    weight: Callable[[], Tensor]
    before: Callable[[], Tensor]
    adapters: tuple[Adapter, ...]
    own: tuple[Tensor, ...]

    @torch.no_grad()
    def effective(self) -> Tensor:
        """Return W' in fp32 (fp64), [out_features, in_features]."""
        weight = self.weight()
        return merged_weight(weight.to(accumulation_dtype(weight.dtype)), self.adapters)

    @torch.no_grad()
    def norm_squared(self) -> Tensor:
        """Return ``||W'||_F^2``, a scalar in fp64, from W's factors where there is a closed form.

        ::

            LoRA    sum_rows ||W||^2 + 2 <W, s B A> + ||s B A||^2        DoRA    with each row times c^2

        LoRA adapters on top of one another are one of all their ranks. DoRA beside others has no such form:
        its W' is made, of this one layer.
        """
        if not self.adapters:
            return row_norm_squared(self.weight()).double().sum()
        one = with_one_adapter(list(self.adapters))
        if one is None:
            return _squared(self.effective())
        squared, across, update = _by_row(self.weight(), one)
        norm = squared + 2 * across + update
        return (norm if one.magnitude is None else norm * _scale(one.magnitude, norm).square()).sum()

    @torch.no_grad()
    def update_squared(self) -> Tensor:
        """Return ``||W' - W||_F^2``, a scalar in fp64: what the adapters changed.

        ::

            W' - W = (c - 1) W + c s B A        (c = 1 for LoRA)
            by row (c - 1)^2 ||W||^2 + 2 (c - 1) c <W, s B A> + c^2 ||s B A||^2
        """
        if not self.adapters:
            return torch.zeros((), dtype=torch.float64, device=self.own[0].device)
        one = with_one_adapter(list(self.adapters))
        if one is None:
            return _squared(self.effective() - self.weight())
        squared, across, update = _by_row(self.weight(), one)
        if one.magnitude is None:
            return update.sum()
        c = _scale(one.magnitude, squared + 2 * across + update)
        return ((c - 1).square() * squared + 2 * (c - 1) * c * across + c.square() * update).sum()


def _by_row(weight: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``||W||^2``, ``<W, s B A>`` and ``||s B A||^2`` by row, [out_features] in fp64.

    Products are in fp32 (fp64), with a block of W's rows in it at a time.
    """
    dtype = accumulation_dtype(weight.dtype)
    A, sB = adapter.lora_A.to(dtype), adapter.lora_B.to(dtype) * adapter.scaling
    across = torch.cat(
        [
            (rows.to(dtype) @ A.t()).mul_(part).sum(1)
            for rows, part in zip(*(_in_blocks(t, weight) for t in (weight, sB)), strict=True)
        ]
    )
    update = (sB * (sB @ (A @ A.t()))).sum(1)
    return row_norm_squared(weight).double(), across.double(), update.double()


def _squared(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    return norm.square()


def _in_blocks(tensor: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor, max(1, BLOCK_ELEMENTS // max(weight.shape[1], 1)))


def _scale(magnitude: Tensor, norm_squared: Tensor) -> Tensor:
    return row_scale(magnitude, norm_squared.clamp(min=0.0).sqrt())


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, AdaptedWeight]]:
    """Yield (path, weight) of every layer with adapters, ours and PEFT's, each once, in the model's order.

    Raises:
        ConfigError: a layer of PEFT's has a variant whose weight is not known.
    """
    for path, layer in adapter_layers(model):
        parameters = [getattr(layer, k)[n] for n, spec in layer.specs.items() for k in spec.kinds]
        works = layer.adapters_enabled and not layer.merged_adapters
        yield (
            path,
            AdaptedWeight(
                layer.weight_out_in,
                partial(_before, layer),
                tuple(_plain(a) for a in layer.adapters()) if works else (),
                (layer.weight, *parameters),
            ),
        )
    for path, tuner in tuner_layers(model):
        yield path, _pefts(path, tuner)


def _plain(adapter: Adapter) -> Adapter:
    """Without what plays no part in the weight."""
    return adapter._replace(dropout_p=0.0, bias=None)


def _before(layer: Any) -> Tensor:
    kept = layer._unmerged if layer.rewritten is None else layer.rewritten.weight
    if kept is None:
        if layer.merged_adapters:
            raise ConfigError("adapters were merged with keep_base=False: the weight before is gone")
        return layer.weight_out_in()  # type: ignore[no-any-return]
    transposed = isinstance(layer, nn.Embedding) or is_conv1d_like(layer)
    numbers: Tensor = kept.t() if transposed else kept
    return numbers.to(layer.weight.device)


def _pefts(path: str, layer: Any) -> AdaptedWeight:
    base = layer.get_base_layer()
    own = [p for n, p in layer.named_parameters() if n.rpartition(".")[2] != "bias" or "lora" in n]
    is_linear = is_linear_layer(layer)
    if not is_linear and not hasattr(layer, "lora_embedding_A"):
        raise ConfigError(f"{path}: the weight of {type(layer).__name__} with its adapters is not known")
    adapters: list[Adapter] = []
    for name in () if layer.disable_adapters or layer.merged_adapters else layer.active_adapters:
        if is_linear and name in layer.lora_A:
            found = read(layer, name)
            if isinstance(found, str):
                raise ConfigError(f"{path}: {found}")
            adapters.append(_plain(found))
        elif not is_linear and name in layer.lora_embedding_A:
            adapters.append(_embedding(layer, name))
    weight = partial(base_weight, layer) if is_linear else base.weight.t
    return AdaptedWeight(weight, weight, tuple(adapters), tuple(own))


def _embedding(layer: Any, name: str) -> Adapter:
    magnitude = layer.lora_magnitude_vector[name].weight if layer.lora_variant.get(name) is not None else None
    A, B, scaling = layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.scaling[name]
    if isinstance(scaling, Tensor):
        B, scaling = B * scaling, 1.0
    return Adapter(name, A, B, None, scaling, 0.0, magnitude)
