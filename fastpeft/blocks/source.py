"""What a module does with its children, read from its source, for any class.

Which of them its forward calls with the same variable, whose results it takes apart, and whose weights it
takes without calling them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

Place = tuple[int, int]
_LOOKS = ("data", "device", "dtype", "is_meta", "ndim", "requires_grad", "shape", "size")


def called_together(kind: Any, names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return, of a class's children ``names``, those that forward calls with one variable, in that order.

    ``self.q_proj(x)`` and ``self.k_proj(x)`` belong together where x is neither assigned to nor written in
    place in between. It is read line by line, without regard to branches: whoever acts on it compares the
    tensors. A class without source has none.
    """
    groups: dict[object, list[str]] = {}
    for name, argument in _calls(kind):
        if name in names and name not in groups.get(argument, []):
            groups.setdefault(argument, []).append(name)
    seen: set[str] = set()
    runs = []
    for group in groups.values():  # a child that is called in several places is in none of the later groups
        if len(group) > 1 and not seen.intersection(group):
            runs.append(tuple(group))
            seen.update(group)
    return tuple(runs)


def variables_of(kind: Any) -> dict[str, list[str]] | None:
    """Return, by child, the variables that a class's forward calls it with; None for one without source."""
    if _tree(kind) is None:
        return None
    found: dict[str, list[str]] = {}
    for name, argument in _calls(kind):
        variables = found.setdefault(name, [])
        if (variable := argument[0]) not in variables:
            variables.append(variable)
    return found


@cache
def _tree(kind: Any) -> ast.Module | None:
    """A class's forward, parsed; None for one without source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return None


@cache
def _calls(kind: Any) -> tuple[tuple[str, tuple[str, int]], ...]:
    """Every ``self.name(variable, ..)`` of a forward: the name, and what tells the variable's value."""
    if (tree := _tree(kind)) is None:
        return ()
    stores = [(n.id, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Name) and _is_store(n)]
    stores += _writes(tree)
    found: list[tuple[Place, str, tuple[str, int]]] = []
    for call, name, variable in _method_calls(tree):
        # A statement's target is assigned after its value is computed, so its own line does not count.
        version = sum(stored == variable and line < call.lineno for stored, line in stores)
        found.append(((call.lineno, call.col_offset), name, (variable, version)))
    return tuple((name, argument) for _, name, argument in sorted(found, key=lambda entry: entry[0]))


def _writes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (variable, line) of what is written in place: ``x.mul_(2)``, ``x[:, 0] = 0``."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=variable), attr=method)):
                if method.endswith("_") and not method.endswith("__"):
                    yield variable, node.lineno
            case ast.Subscript(value=ast.Name(id=variable), ctx=ast.Store()):
                yield variable, node.lineno


@cache
def taken_apart(kind: Any) -> frozenset[str]:
    """Return the children whose result a class's forward splits or slices: several linears in one already.

    ``qkv = self.qkv(x)`` and then ``qkv[..., :n]`` or ``qkv.chunk(3)``, or all in one expression.
    """
    if (tree := _tree(kind)) is None:
        return frozenset()
    variables: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=variable)], value=value):
                if (name := _child_called(kind, value)) is not None:
                    variables[variable] = name
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="chunk" | "split" | "tensor_split" | "unbind", value=whole)
            ):
                found.add(_child_called(kind, whole, variables))
            case ast.Subscript(value=whole, slice=ast.Tuple(elts=[*_, ast.Slice()])):
                found.add(_child_called(kind, whole, variables))
    return frozenset(name for name in found if name is not None)


def _child_called(
    kind: Any, node: ast.AST, variables: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """Return ``name`` for ``self.name(..)``, methods called on it or with it or not, or for its variable."""
    while True:
        match node:
            # A method of the class, as those that make heads of a projection's result.
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[inner, *_]) if (
                inspect.isfunction(getattr(kind, name, None))
            ):
                node = inner
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                return name
            case ast.Call(func=ast.Attribute(value=inner)):
                node = inner
            case ast.Name(id=variable):
                return variables.get(variable)
            case _:
                return None


@cache
def weights_read(kind: Any) -> frozenset[str]:
    """Return the children whose ``self.name.weight`` a method of a class reads instead of calling them.

    Mamba's mixer hands the weights of its projections to a kernel: an adapter on them would never be asked.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    found: set[str] = set()
    for method in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        found |= _weights(method) - {name for _, name, _ in _method_calls(method)}
    return frozenset(found)


def _weights(method: ast.FunctionDef) -> set[str]:
    """The names in every ``self.name.weight`` that is more than looked at."""
    looked_at = {id(n.value) for n in ast.walk(method) if isinstance(n, ast.Attribute) and n.attr in _LOOKS}
    found = set()
    for node in ast.walk(method):
        match node:
            case ast.Attribute(attr="weight", value=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                if id(node) not in looked_at and isinstance(node.ctx, ast.Load):
                    found.add(name)
    return found


def _is_store(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _method_calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """Yield (call, name, variable) of every ``self.name(variable, ..)``."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[ast.Name(id=variable), *_]
            ):
                yield node, name, variable
