"""A model whose parameters are ``W_0 + P theta_d``: what holds theta_d, and what modules read of it.

Every module that owns such parameters keeps its place and its Parameters, W_0, and changes its class for one
made from it: there ``module.weight`` is computed at every reading, whoever reads. ``nn.Linear``,
``nn.Embedding`` and transformers' ``Conv1D`` compute their forward by ops that keep no W for backward; what
other classes keep of a W that they read is autograd's: norms little, convolutions their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.layers.kinds import is_conv1d_class
from fastpeft.ops.subspace import Projection, coordinates
from fastpeft.ops.subspace_embedding import subspace_embedding
from fastpeft.ops.subspace_linear import subspace_linear
from fastpeft.ops.subspace_weight import subspace_weight
from fastpeft.sharding import is_sharded

CHILD = "subspace"  # its name in the model
_SLOT = "_fastpeft_subspace"


class Subspace(nn.Module):
    """theta_d, the scales of modules where they have some, and what the projections read.

    Args:
        projection: which; its ``d`` is theta_d's size.
        scales: how many modules have a scale of their own; 0 for none.
        tables: of :func:`fastpeft.ops.subspace.tables`.
        kind: ``dtype`` and ``device`` of the parameters.
    """

    adapters_enabled = True

    def __init__(self, projection: Projection, scales: int, tables: list[Tensor], **kind: Any) -> None:
        super().__init__()
        self.projection = projection
        self.theta_d = nn.Parameter(torch.zeros(projection.d, **kind))
        self.lambdas = nn.Parameter(torch.ones(scales, **kind)) if scales else None
        for i, table in enumerate(tables):
            # Not in state_dict: they follow from the seed.
            self.register_buffer(f"table_{i}", table.to(kind["device"]), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # A model cast to 16 bits keeps all of this as it is: a step would be lost in rounding, and P another
        # one.
        held = {
            name: t.data for name, t in (*self._parameters.items(), *self._buffers.items()) if t is not None
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in held.items():
            now: Tensor = getattr(self, name)
            if now.dtype in (torch.float16, torch.bfloat16) and before.dtype != now.dtype:
                now.data = before.to(now.device)
        return self

    @property
    def tables(self) -> list[Tensor]:
        """What the projections read."""
        tables: list[Any] = [self.table_0, self.table_1]
        return tables

    def operands(self, scale: int, weight: Tensor) -> tuple[Tensor, list[Tensor], list[int]]:
        """Return phi [n] for the module with this scale's number, the tables and the projection's numbers.

        They are on the weight's device, which in a model over several is not theta_d's.
        """
        theta_d: Tensor = self.theta_d
        if self.lambdas is not None:
            theta_d = theta_d * self.lambdas[scale]
        phi = coordinates(self.projection, theta_d, self.tables).to(weight.device)
        return phi, [table.to(weight.device) for table in self.tables], self.projection.spec()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``: an ``nn.Sequential`` runs every child that it has."""
        return x

    def extra_repr(self) -> str:
        """Return the projection."""
        kind = "fastfood" if self.projection.is_fastfood else "hashed"
        scales = "" if self.lambdas is None else f", {len(self.lambdas)} scales"
        return f"{kind}, d={self.projection.d}{scales}, of {self.projection.total:,} parameters"


@dataclass
class Slot:
    """One module's share.

    Attributes:
        subspace: of the model. (A list, so that no module registers it a second time.)
        scale: the module's number among those with a scale.
        first: the first block of each of its parameters, by name.
        base: while merged, W_0 in host memory; empty where it was not kept.
        is_merged: whether the Parameters hold ``W_0 + P theta_d``.
    """

    subspace: list[Subspace]
    scale: dict[str, int]
    first: dict[str, int]
    base: dict[str, Tensor] = field(default_factory=dict)
    is_merged: bool = False

    @property
    def is_off(self) -> bool:
        """Whether the Parameters are what the module computes with."""
        return self.is_merged or not self.subspace[0].adapters_enabled

    def added(self, name: str, parameter: Tensor) -> Tensor:
        """Return ``W_0 + P theta_d``."""
        operands = self.subspace[0].operands(self.scale[name], parameter)
        return subspace_weight(parameter, *operands, self.first[name])


def slot_of(module: nn.Module) -> Slot | None:
    """Return a module's share, or None if it has none."""
    return module.__dict__.get(_SLOT)


class _Moved(nn.Module):
    """What the made classes have in common."""

    kind: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made, not imported
        names = tuple(self.__dict__[_SLOT].first)
        return _rebuild, (self.kind, names), self.__dict__


class _MovedLinear(_Moved):
    is_transposed = False

    def forward(self, input: Tensor) -> Tensor:
        return self._product(input)

    def _product(self, x: Tensor) -> Tensor:
        slot: Slot = self.__dict__[_SLOT]
        if slot.is_off:
            result: Tensor = self.kind.forward(self, x)
            return result
        subspace, parameters = slot.subspace[0], self._parameters
        scales = set(slot.scale.values())
        if subspace.lambdas is not None and len(scales) > 1:
            # A weight that is tied to another module's has that one's scale.
            weight: Any = self.weight
            bias: Any = self.bias
            return F.linear(x, weight.t() if self.is_transposed else weight, bias)
        base = parameters["weight"]
        assert base is not None
        first = [slot.first.get("weight", -1), slot.first.get("bias", -1)]
        operands = subspace.operands(min(scales), base)
        return subspace_linear(x, base, parameters["bias"], *operands, first, transposed=self.is_transposed)


class _MovedConv1D(_MovedLinear):
    is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


class _MovedEmbedding(_Moved):
    def forward(self, input: Tensor) -> Tensor:
        slot: Slot = self.__dict__[_SLOT]
        module: Any = self
        if slot.is_off or module.max_norm is not None or module.scale_grad_by_freq:
            result: Tensor = self.kind.forward(self, input)
            return result
        base, padding = module._parameters["weight"], module.padding_idx
        operands = slot.subspace[0].operands(slot.scale["weight"], base)
        padding = -1 if padding is None else padding
        return subspace_embedding(input, base, *operands, slot.first["weight"], padding)


_MADE: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _made(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the class for modules of a class whose parameters of these names are computed."""
    if (kind, names) not in _MADE:
        parts: type[nn.Module] = _Moved
        if kind is nn.Linear:
            parts = _MovedLinear
        elif kind is nn.Embedding:
            parts = _MovedEmbedding
        elif is_conv1d_class(kind):
            parts = _MovedConv1D
        members: dict[str, Any] = {name: _computed(name) for name in names}
        members.update(kind=kind, __module__=__name__)
        _MADE[kind, names] = type(f"Subspace{kind.__name__}", (parts, kind), members)
    return _MADE[kind, names]


def _computed(name: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        parameter, slot = module._parameters[name], slot_of(module)
        if parameter is None or slot is None or slot.is_off or is_sharded([parameter]):
            return parameter  # a shard is what FSDP2 reads; in forward it puts the whole weight there
        return slot.added(name, parameter)

    return property(read)


def _rebuild(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _made(kind, names)
    return made.__new__(made)


def move(module: nn.Module, slot: Slot) -> None:
    """Let a module compute with ``W_0 + P theta_d`` from now on."""
    module.__dict__[_SLOT] = slot
    module.__class__ = _made(type(module), tuple(slot.first))


def move_back(module: nn.Module) -> None:
    """Undo :func:`move`."""
    del module.__dict__[_SLOT]
    module.__class__ = type(module).kind  # type: ignore[attr-defined]
