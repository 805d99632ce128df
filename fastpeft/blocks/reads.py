"""What a forward reads of its module beside some of its linears, and whether all of that still is as it was.

A forward is run on a :class:`StandIn`, which hands out the module's attributes and takes note of them
(:class:`Reads`); its children are copies, and what cannot be shielded from the run, or may differ from one
call to the next (tensors, lists, children with parameters; anything that is written), is not handed out.
"""

from __future__ import annotations

import copy
import enum
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.in_place.adapters import has_hooks, is_replaced

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_COMPARED = (*_NUMBERS, tuple, MethodType)  # others are the same object or have changed
_VALUES = (*_NUMBERS, torch.dtype, torch.device, torch.memory_format, enum.Enum)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
# A stand-in's own attributes, under names that no forward asks for.
_MODULE, _LINEARS, _NOTES, _OWNER = (f"<{name}>" for name in ("module", "linears", "notes", "owner"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Missing:
    """Stands for an attribute that is not there; the class itself, which pickles as what it is."""


class CannotReadError(Exception):
    """A forward asks for what a stand-in does not hand out."""


class OfClass:
    """Attributes of a class: functions, mostly. Unpickled, they are those that the class has then."""

    def __init__(self, kind: Any, names: tuple[str, ...]) -> None:
        self.kind = kind
        self.entries = tuple((name, getattr(kind, name)) for name in names)

    def __reduce__(self) -> tuple[type[OfClass], tuple[Any, tuple[str, ...]]]:
        return OfClass, (self.kind, tuple(name for name, _ in self.entries))

    def __deepcopy__(self, memo: dict[int, Any]) -> OfClass:
        return self

    def hold(self, module: nn.Module) -> bool:
        """Whether a module, of that class or a subclass, has these and none of its own in their places."""
        kind, own = type(module), module.__dict__
        for name, value in self.entries:
            if getattr(kind, name, _Missing) is not value or (name in own and name != "forward"):
                return False
        return True


def _same(now: object, then: object) -> bool:
    return now is then or (type(then) in _COMPARED and type(now) is type(then) and now == then)


@dataclass(frozen=True, slots=True)
class _Part:
    """One module of a child's tree: its class's forward, its attributes and its children."""

    module: nn.Module
    of_class: OfClass
    attributes: tuple[tuple[str, Any], ...]
    children: tuple[nn.Module | None, ...]

    def holds(self) -> bool:
        """Whether all is as it was, and nobody watches or replaces the module's call."""
        module = self.module
        own = module.__dict__
        if has_hooks(module) or is_replaced(module) or not self.of_class.hold(module):
            return False
        for name, then in self.attributes:
            if not _same(own.get(name, _Missing), then):
                return False
        now = own["_modules"].values()
        return len(now) == len(self.children) and all(a is b for a, b in zip(now, self.children, strict=True))


def _parts(child: nn.Module) -> Iterator[_Part]:
    for module in child.modules():
        own = module.__dict__
        attributes = tuple((name, value) for name, value in own.items() if name not in _OF_EVERY_MODULE)
        yield _Part(module, OfClass(type(module), ("forward",)), attributes, tuple(own["_modules"].values()))


@dataclass(frozen=True, slots=True)
class Reads:
    """What a forward has read.

    Attributes:
        of_class: the class's forward and the methods and properties it uses.
        values: (owner, name, value) of attributes; without an owner, the module's own.
        children: (name, parts) of the child modules that it calls.
    """

    of_class: OfClass
    values: tuple[tuple[Any, str, Any], ...]
    children: tuple[tuple[str, tuple[_Part, ...]], ...]

    def hold(self, module: nn.Module) -> bool:
        """Whether the module would read the same now, and calling its children does no more than before."""
        if not self.of_class.hold(module):
            return False
        for owner, name, then in self.values:
            if not _same(getattr(module if owner is None else owner, name, _Missing), then):
                return False
        modules = module._modules
        for name, parts in self.children:
            if modules.get(name) is not parts[0].module or not all(part.holds() for part in parts):
                return False
        return True


@dataclass
class Notes:
    """What the runs of one forward have read so far."""

    methods: dict[str, None] = field(default_factory=dict)
    values: dict[tuple[int, str], tuple[Any, str, Any]] = field(default_factory=dict)
    children: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)  # itself and its copy

    def reads(self, module: nn.Module) -> Reads:
        """Return them as what is to be compared at every call."""
        children = tuple((name, tuple(_parts(child))) for name, (child, _) in self.children.items())
        of_class = OfClass(type(module), ("forward", *self.methods))
        return Reads(of_class, tuple(self.values.values()), children)


class StandIn:
    """A module, but for some of its linears, in either mode; what happens to it does not reach the module."""

    def __init__(
        self, module: nn.Module, linears: dict[str, nn.Linear], notes: Notes, training: bool
    ) -> None:
        self.__dict__.update({_MODULE: module, _LINEARS: linears, _NOTES: notes, "training": training})

    def __setattr__(self, name: str, value: Any) -> None:
        raise CannotReadError(f"it writes {name}")

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        module, linears, notes = own[_MODULE], own[_LINEARS], own[_NOTES]
        if name in linears:
            return linears[name]
        if name in module._parameters or name in module._buffers or name in _OF_EVERY_MODULE:
            raise CannotReadError(name)
        if name in module._modules and module._modules[name] is not None:
            if name not in notes.children:
                notes.children[name] = (module._modules[name], _shielded(module._modules[name]))
            return notes.children[name][1].train(own["training"])
        if name not in module.__dict__ and name not in module._modules:
            static = inspect.getattr_static(type(module), name, None)
            if isinstance(static, FunctionType | property):
                notes.methods[name] = None
                return MethodType(static, self) if isinstance(static, FunctionType) else static.fget(self)  # type: ignore[misc]
        return _noted(notes, None, name, getattr(module, name, _Missing))


def _shielded(child: nn.Module) -> nn.Module:
    """Return a copy of a child without hooks."""
    if any(True for _ in child.parameters()) or any(is_replaced(m) for m in child.modules()):
        raise CannotReadError("a child with parameters, or with another forward than its class's")
    twin = copy.deepcopy(child)
    for module in twin.modules():
        for hooks in _HOOKS:
            module.__dict__[hooks].clear()
    return twin


class _Watched:
    """An object that is neither a value nor a function (a configuration): its values are handed out."""

    def __init__(self, owner: Any, notes: Notes) -> None:
        self.__dict__.update({_OWNER: owner, _NOTES: notes})

    def __setattr__(self, name: str, value: Any) -> None:
        raise CannotReadError(f"it writes {name}")

    def __getattr__(self, name: str) -> Any:
        owner, notes = self.__dict__[_OWNER], self.__dict__[_NOTES]
        return _noted(notes, owner, name, getattr(owner, name, _Missing))


def _noted(notes: Notes, owner: Any, name: str, value: Any) -> Any:
    """Take note of an attribute and return what a stand-in hands out for it."""
    if isinstance(value, Tensor | nn.Module | list | dict | set):
        raise CannotReadError(name)
    if isinstance(value, tuple) and not all(isinstance(entry, _VALUES) for entry in value):
        raise CannotReadError(name)
    notes.values.setdefault((id(owner), name), (owner, name, value))
    if value is _Missing:
        raise AttributeError(name)
    if isinstance(value, (tuple, *_VALUES)) or callable(value):
        return value
    return _Watched(value, notes)
