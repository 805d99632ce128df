"""Why linears with adapters that stand side by side in a module are computed each on its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fastpeft.blocks import gated, shared
from fastpeft.blocks.source import taken_apart, variables_of
from fastpeft.blocks.view import own_product
from fastpeft.in_place.adapters import is_replaced


def on_their_own(module: nn.Module, adapted: Sequence[str]) -> Iterator[str]:
    """Yield a line for those of a module's linears that are in no block, of two or more with adapters."""
    if len(adapted) < 2:
        return
    together: set[str] = set()
    siblings: shared.Siblings | None = module.__dict__.get(shared.ATTRIBUTE)
    roles: gated.Gated | str | None = module.__dict__.get(gated.ATTRIBUTE)
    if isinstance(roles, gated.Gated) and gated.is_ours(module):
        together |= {roles.gate, roles.up, roles.down}
    elif siblings is not None:
        together |= {name for run in siblings.runs for name in run}
    kind: Any = type(module)
    by_reason: dict[str, list[str]] = {}
    for name in adapted:
        if name not in together and name not in taken_apart(kind):
            by_reason.setdefault(_reason(module, name, siblings), []).append(name)
    for reason, names in by_reason.items():
        yield f"{', '.join(names)}: not fused, because {reason}"


def _reason(module: nn.Module, name: str, siblings: shared.Siblings | None) -> str:
    child = module._modules[name]
    assert child is not None
    if (own := own_product(child)) is not None:
        return own
    if is_replaced(module) and not gated.is_ours(module):
        return f"the forward of this {type(module).__name__} was replaced by other code"
    if siblings is not None:
        for run in siblings.given_up:
            if name in run:
                return f"{', '.join(run)} were called with different tensors {shared.MAX_MISSES} times"
    variables = variables_of(type(module))
    if variables is None:
        return f"the forward of {type(module).__name__} has no source to read"
    if name not in variables:
        return f"the forward of {type(module).__name__} does not call it with a variable"
    return f"no other linear that can be fused is called with {' or '.join(variables[name])}"
