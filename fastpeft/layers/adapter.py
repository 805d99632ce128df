"""What every patched layer shares: adapter parameters by name, switching and merging.

A layer keeps the base's own ``weight`` and ``bias`` Parameters under their own names, so the base model's
state_dict keys, tied weights and code that reads ``layer.weight`` see no difference. Beside them it holds, by
adapter name, what an adapter's :class:`Spec` creates: for LoRA ``lora_A[name] [r, in_features]``,
``lora_B[name] [out_features, r]`` and, for DoRA, ``lora_magnitude_vector[name] [out_features]``; and
``lora_dropout[name]`` where it drops anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastpeft.errors import ConfigError
from fastpeft.layers.adapted import Adapter
from fastpeft.layers.held import Held, entries_of, is_compiled, watch
from fastpeft.layers.initialise import base_factors, initialise
from fastpeft.layers.merging import merged_weight, weighted_weight
from fastpeft.layers.norm_cache import PLAIN_TYPES, NormCache
from fastpeft.ops.probability import Probability, follow, probability_of
from fastpeft.ops.row_norm import row_norm, row_norm_squared

# What a layer may hold for its adapters, each a ParameterDict by adapter name.
_LORA = ("lora_A", "lora_B", "lora_magnitude_vector")


class Spec(Protocol):
    """One module's share of a configuration: what its adapter is made of, and what that amounts to."""

    @property
    def r(self) -> int:
        """The rank."""

    @property
    def scaling(self) -> float:
        """The factor on ``B A``."""

    @property
    def use_dora(self) -> bool:
        """Whether there is a magnitude."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The ParameterDicts of the layer that the adapter has an entry in."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Those of them that never train."""

    @property
    def shared(self) -> tuple[str, ...]:
        """The ModuleDicts of the layer that the adapter has an entry in, shared with other layers."""

    def create(self, layer: AdapterMixin, name: str) -> None:
        """Make and initialise the adapter's parameters."""

    def adapter(self, layer: AdapterMixin, name: str) -> Adapter:
        """Return the adapter as forward takes it."""

    def __str__(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """One module's share of a :class:`fastpeft.LoRA`: rank and scaling resolved for its path."""

    r: int
    scaling: float
    lora_dropout: float
    use_dora: bool
    dropout_on_base: bool
    init_lora_weights: bool | str
    freeze_lora_A: bool

    shared = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """A, B and, for DoRA, the magnitude."""
        return _LORA if self.use_dora else _LORA[:2]

    @property
    def frozen(self) -> tuple[str, ...]:
        """LoRA-FA's A."""
        return ("lora_A",) if self.freeze_lora_A else ()

    def create(self, layer: AdapterMixin, name: str) -> None:
        """A and B as ``init_lora_weights`` says; the magnitude such that DoRA starts as LoRA does."""
        weight = layer.weight_out_in()
        out_features, in_features = weight.shape
        dtype = adapter_dtype(weight)
        lora_A = torch.empty(self.r, in_features, dtype=dtype, device=weight.device)
        lora_B = torch.zeros(out_features, self.r, dtype=dtype, device=weight.device)
        layer.initialise(lora_A, lora_B, weight, self)
        layer.lora_A[name] = nn.Parameter(lora_A, requires_grad=not self.freeze_lora_A)
        layer.lora_B[name] = nn.Parameter(lora_B)
        layer.add_dropout(name, self.lora_dropout)
        if self.use_dora:
            with torch.no_grad():
                # The norm that forward computes, so that the row scale starts at exactly 1 where B is zero.
                norm = row_norm(weight, lora_A, lora_B, self.scaling, row_norm_squared(weight))
            layer.lora_magnitude_vector[name] = nn.Parameter(norm.to(dtype))

    def adapter(self, layer: AdapterMixin, name: str) -> Adapter:
        """LoRA's or DoRA's matrices as they are."""
        return Adapter(
            name,
            layer.parameter_of("lora_A", name),
            layer.parameter_of("lora_B", name),
            None,
            self.scaling,
            layer.dropout_p(name),
            layer.parameter_of("lora_magnitude_vector", name) if self.use_dora else None,
            self.dropout_on_base,
        )

    def __str__(self) -> str:
        method = "DoRA" if self.use_dora else "LoRA"
        dropout = f", dropout={self.lora_dropout}" if self.lora_dropout else ""
        frozen = ", A frozen" if self.freeze_lora_A else ""
        return f"{method}(r={self.r}, scaling={self.scaling:g}{dropout}{frozen})"


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of adapters: fp32 over a 16-bit or quantised base, the base's otherwise."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class Rewritten:
    """What an adapter's initialisation took out of the base weight, in host memory.

    Attributes:
        name: the adapter.
        weight: the base weight before, as it is stored.
        lora_A: the adapter's A at the start, [r, in_features].
        lora_B: likewise B, [out_features, r].
    """

    name: str
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor


@cache
def _input_name(kind: type[nn.Module]) -> str:
    """Return what the patched module's own forward calls its input."""
    own: Any = next(c for c in kind.__mro__ if not issubclass(c, AdapterMixin) and "forward" in c.__dict__)
    return list(inspect.signature(own.forward).parameters)[1]


class AdapterMixin(nn.Module):
    """Adapters of a module; the sibling base class is the patched module's own.

    That sibling declares ``weight`` and ``bias``.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict
    # Of the adapters that drop anything; their p may change at any time, as PEFT's may.
    lora_dropout: nn.ModuleDict
    specs: dict[str, Spec]
    adapters_enabled: bool
    merged_adapters: tuple[str, ...]
    # One name for every row of the next inputs, where rows go by different adapters.
    row_adapters: tuple[str, ...] | None
    # What the adapters' outputs are multiplied by for the moment (fastpeft.sparse.suppression).
    response: Tensor | None = None

    def weight_out_in(self) -> Tensor:
        """Return the base weight as [out_features, in_features], a view; dequantised where it is not one."""
        raise NotImplementedError

    def base_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the module computes without adapters."""
        raise NotImplementedError

    def can_merge(self) -> bool:
        """Whether the weight can take an update."""
        return True

    def adopt(self, base: nn.Module) -> None:
        """Take over the base module's whole state: the same Parameters, buffers, hooks and attributes."""
        self.__dict__.update(base.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            # Copies, so that the adapter's entries do not reach the base module; hooks stay shared, so that
            # a handle taken before the patch still removes its hook.
            self.__dict__[registry] = base.__dict__[registry].copy()
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.lora_dropout = nn.ModuleDict()
        for entries in (self.lora_A, self.lora_B, self.lora_magnitude_vector, self.lora_dropout):
            watch(entries)
        self.specs = {}
        self.active_adapters = ()
        self.adapters_enabled = True
        self.merged_adapters = ()
        self.row_adapters = None
        self._unmerged: Tensor | None = None
        self.rewritten: Rewritten | None = None
        self._norm_caches: dict[str, NormCache] = {}

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """Those whose names are here and in ``specs`` take part in forward, in this order."""
        return self._active_adapters

    @active_adapters.setter
    def active_adapters(self, names: tuple[str, ...]) -> None:
        self._active_adapters = names
        self._held = self._hold()

    @property
    def active_adapter(self) -> str:
        """The first of the active adapters."""
        return self.active_adapters[0]

    def _hold(self) -> tuple[Held, ...] | None:
        """Return the active adapters as compiled code reads them, None where it has to read them itself."""
        specs = [(name, self.specs[name]) for name in self._active_adapters if name in self.specs]
        entries = [entries_of(getattr(self, kind)) for kind in (*_LORA, "lora_dropout")]
        scalings = {spec.scaling for spec in self.specs.values()}
        found = []
        for name, spec in specs:
            if not isinstance(spec, AdapterSpec) or None in entries:
                return None  # of another method, or somebody put dictionaries of his own there
            A, B, m, dropout = (watched.place(name) for watched in entries if watched is not None)
            scaling: float | Tensor = spec.scaling
            if len(scalings) > 1:
                scaling = torch.tensor(spec.scaling, dtype=torch.float64, device="cpu")
            found.append(Held(A, B, m if spec.use_dora else None, dropout, scaling, spec.dropout_on_base))
        return tuple(found)

    def add_adapter(self, name: str, spec: Spec) -> None:
        """Create and initialise the parameters of one adapter, on the base's device; it is not active yet."""
        spec.create(self, name)
        self.specs[name] = spec
        self._held = self._hold()

    def initialise(self, lora_A: Tensor, lora_B: Tensor, weight: Tensor, spec: AdapterSpec) -> None:
        """Fill A and B, given empty and zero, as the specification says."""
        initialise(lora_A, lora_B, weight, spec.init_lora_weights, spec.scaling)

    @torch.no_grad()
    def rewrite_base(self, name: str) -> None:
        """Take what an adapter starts with out of the base weight, where its initialisation asks for that."""
        spec = self.specs[name]
        if not isinstance(spec, AdapterSpec) or not self.rewrites(spec):
            return
        weight, adapter = self.weight_out_in(), spec.adapter(self, name)._replace(magnitude=None)
        A, B = (matrix.detach().to("cpu", copy=True) for matrix in (adapter.lora_A, adapter.lora_B))
        self.rewritten = Rewritten(name, self.weight.detach().to("cpu", copy=True), A, B)
        weight.copy_(merged_weight(weight, [adapter._replace(scaling=-spec.scaling)]))
        if spec.use_dora:
            norm = row_norm(
                weight, self.lora_A[name], self.lora_B[name], spec.scaling, row_norm_squared(weight)
            )
            self.lora_magnitude_vector[name].copy_(norm)

    def rewrites(self, spec: AdapterSpec) -> bool:
        """Whether an adapter's initialisation moves a part of this layer's weight into it."""
        return base_factors(spec.init_lora_weights) is not None

    @torch.no_grad()
    def restore_base(self) -> None:
        """Give the base weight back as it was before :meth:`rewrite_base`, to the bit."""
        if self.rewritten is not None:
            self.weight.copy_(self.rewritten.weight)
            self.rewritten = None

    def delete_adapter(self, name: str) -> None:
        """Forget one adapter, if the layer has it."""
        if (spec := self.specs.pop(name, None)) is not None:
            for kind in (*spec.kinds, *spec.shared):
                entries = getattr(self, kind)
                if parametrize.is_parametrized(entries, name):  # then it is no entry that could be deleted
                    parametrize.remove_parametrizations(entries, name, leave_parametrized=True)
                del entries[name]
            self.lora_dropout._modules.pop(name, None)
        self._norm_caches.pop(name, None)
        self.active_adapters = tuple(n for n in self.active_adapters if n != name)

    def train_adapters(self, names: Sequence[str]) -> None:
        """Gradients for these adapters, but for what of them is frozen, and for no other."""
        for name, spec in self.specs.items():
            for kind in spec.kinds:
                trains = name in names and kind not in spec.frozen
                for leaf in self._leaves_of(kind, name):
                    leaf.requires_grad_(trains)

    def adapters(self, names: Sequence[str] | None = None) -> list[Adapter]:
        """Return those adapters of these names (default: the active ones) that the layer has, of any rank."""
        held = self._held if names is None and is_compiled() else None
        if held is not None and all(one.is_readable() for one in held):
            return [one.adapter() for one in held]
        chosen = self.active_adapters if names is None else names
        present = [(name, self.specs[name]) for name in chosen if name in self.specs]
        return [spec.adapter(self, name) for name, spec in present if spec.r]

    def parameter_of(self, kind: str, name: str) -> Tensor:
        """Return ``layer.kind[name]``, past ParameterDict's own lookup, which takes 2 us."""
        held: Any = self._modules[kind]
        registered: dict[str, Any] = held._parameters
        # One with a parametrization (torch.nn.utils.parametrize) is computed when it is asked for; a replica
        # of nn.DataParallel holds plain tensors, as attributes.
        parameter: Tensor = registered[name] if name in registered else held[name]
        return parameter

    def _leaves_of(self, kind: str, name: str) -> Iterable[nn.Parameter]:
        held: Any = self._modules[kind]
        if (parameter := held._parameters.get(name)) is not None:
            return (parameter,)
        parameters: Iterable[nn.Parameter] = held.parametrizations[name].parameters()
        return parameters

    def input_of(self, kwargs: dict[str, Any]) -> Tensor:
        """Take the input out of a call's keywords, where it is not given by position.

        Raises:
            TypeError: it is not there either.
        """
        name = _input_name(type(self))  # type: ignore[arg-type]  # a class is hashable
        if name not in kwargs:
            raise TypeError(f"{type(self).__name__}: missing argument {name!r}")
        x: Tensor = kwargs.pop(name)
        return x

    def _replicate_for_data_parallel(self) -> Any:
        """For nn.DataParallel: a replica is computed by itself, from its own parameters."""
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.siblings = None
        replica._norm_caches = {}
        return replica

    def add_dropout(self, name: str, p: float) -> None:
        """Let an adapter drop elements of its input while the layer trains."""
        if p > 0.0:
            dropout = nn.Dropout(p).train(self.training)
            follow(dropout)
            # Not by its own setter, which refuses names like 'type' and 'train'.
            self.lora_dropout._modules[name] = dropout

    def dropout_p(self, name: str) -> Probability:
        """Return what an adapter drops now.

        Raises:
            ConfigError: its p was set to what no dropout can have.
        """
        held: Any = self._modules["lora_dropout"]
        dropout: nn.Module | None = held._modules.get(name)
        if dropout is None:
            return 0.0
        if (p := probability_of(dropout)) is None:
            raise ConfigError(f"lora_dropout of {name!r}: expected nn.Dropout of 0 <= p < 1, got {dropout}")
        return p

    def norm_cache(self, name: str) -> NormCache:
        """Return the cache of an adapter's row norm."""
        cache = self._norm_caches.get(name)
        if cache is None:
            cache = self._norm_caches[name] = NormCache()
        return cache

    def kept_norm(self, adapter: Adapter) -> Tensor | None:
        """Return an adapter's row norm where it is kept from call to call without a gradient, else None.

        That is on a CPU. On a GPU every norm would take a launch of its own to be proved; the products for
        all adapters together are as many for any number of them.
        """
        weight = self.weight
        if not weight.is_cpu or type(weight) not in PLAIN_TYPES or torch.compiler.is_compiling():
            return None
        cache = self.norm_cache(adapter.name)
        return cache.norm(weight, self.weight_out_in(), adapter.lora_A, adapter.lora_B, adapter.scaling)

    @torch.no_grad()
    def merge(self, names: Sequence[str], *, keep_base: bool, factors: Sequence[float] | None = None) -> bool:
        """Write these adapters into the weight; False, and nothing done, where the result is not finite.

        The weight as it was goes to host memory if ``keep_base``: no subtraction gives it back to the bit.
        """
        weight = self.weight_out_in()
        present = [name for name in names if name in self.specs and self.specs[name].r]
        adapters = self.adapters(present)
        if factors is None:
            merged = merged_weight(weight, adapters)
        else:
            by_name = dict(zip(names, factors, strict=True))
            merged = weighted_weight(weight, adapters, [by_name[name] for name in present])
        if not torch.isfinite(merged).all():
            return False
        self._unmerged = self.weight.detach().to("cpu", copy=True) if keep_base else None
        weight.copy_(merged)
        self.merged_adapters = tuple(names)
        return True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Write the weight back that was there before :meth:`merge`."""
        assert self._unmerged is not None
        self.weight.copy_(self._unmerged)
        self._unmerged, self.merged_adapters = None, ()

    def adapter_repr(self) -> str:
        """Return what the layer's repr adds to the base's."""
        several = len(self.specs) > 1
        return ", ".join(f"{name}: {spec}" if several else str(spec) for name, spec in self.specs.items())
