"""Find a model's blocks and put our forward on them; take it off again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastpeft.blocks import gated, shared
from fastpeft.blocks.apart import on_their_own
from fastpeft.blocks.source import called_together, taken_apart
from fastpeft.blocks.view import own_product
from fastpeft.in_place.adapters import is_replaced
from fastpeft.in_place.install import is_accelerated, is_linear_layer
from fastpeft.in_place.own_forward import put_forward, take_forward
from fastpeft.in_place.record import LAYER_ATTRIBUTE
from fastpeft.layers.kinds import is_conv1d
from fastpeft.layers.linear import LinearMixin


def fuse_blocks(model: nn.Module) -> None:
    """Let linears with adapters that belong together be computed together; known blocks stay as they are."""
    for module in model.modules():
        linears = dict(_linears(module))
        if len(linears) < 2 or not any(_has_adapters(module._modules[name]) for name in linears):
            continue
        if gated.ATTRIBUTE not in module.__dict__:
            roles = gated.find_roles(module, linears)
            if isinstance(roles, gated.Gated) and (why := _own_products(module, linears)) is not None:
                roles = why
            if roles is not None:
                module.__dict__[gated.ATTRIBUTE] = roles
            if isinstance(roles, gated.Gated):
                put_forward(module, gated.gated_forward)
        _group_siblings(module, linears)


def release_blocks(model: nn.Module) -> None:
    """Undo :func:`fuse_blocks`."""
    for module in model.modules():
        if gated.is_ours(module):
            take_forward(module)
        module.__dict__.pop(gated.ATTRIBUTE, None)
        if module.__dict__.pop(shared.ATTRIBUTE, None) is not None:
            for child in module.children():
                if (holder := _holder(child)) is not None:
                    holder.siblings = None


def described(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (path, what it is) of every block, and of linears side by side that are none."""
    for path, module in model.named_modules():
        kind: Any = type(module)
        roles: gated.Gated | str | None = module.__dict__.get(gated.ATTRIBUTE)
        if isinstance(roles, gated.Gated):
            if gated.is_ours(module):
                yield path, str(roles)
                continue
            roles = "its forward was replaced by other code"
        if roles is not None:
            yield path, f"like a gated MLP, but {roles}"
        siblings: shared.Siblings | None = module.__dict__.get(shared.ATTRIBUTE)
        for run in siblings.runs if siblings is not None else ():
            yield path, f"{', '.join(run)} share their input and are one op"
        for name in sorted(taken_apart(kind) & module._modules.keys()):
            if _has_adapters(module._modules[name]) and not isinstance(roles, gated.Gated):
                yield path, f"{name} is several linears in one already: one op reads its input once for all"
        adapted = [name for name, child in module._modules.items() if _is_adapted_linear(child)]
        yield from ((path, line) for line in on_their_own(module, adapted))
        if isinstance(module, nn.TransformerEncoderLayer) and adapted:
            yield (
                path,
                f"in evaluation without gradients torch's fast path leaves out the adapters of "
                f"{', '.join(adapted)}, as it does PEFT's: torch.backends.mha.set_fastpath_enabled(False)",
            )


def _own_products(module: nn.Module, linears: dict[str, tuple[int, int]]) -> str | None:
    for name in linears:
        child = module._modules[name]
        assert child is not None
        if (why := own_product(child)) is not None:
            return f"of {name}: {why}"
    return None


def _linears(module: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (in, out) features) of the linears that are a module's own children."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if isinstance(child, LinearMixin):
            out_features, in_features = child.weight_out_in().shape
            yield name, (in_features, out_features)
        elif is_linear_layer(child):
            layer: Any = child
            yield name, (layer.in_features, layer.out_features)
        elif type(child) is nn.Linear or is_conv1d(child):
            rows, columns = child.weight.shape  # type: ignore[misc]
            yield name, (rows, columns) if is_conv1d(child) else (columns, rows)


def _has_adapters(child: nn.Module | None) -> bool:
    return isinstance(child, LinearMixin) or (child is not None and is_accelerated(child))


def _is_adapted_linear(child: nn.Module | None) -> bool:
    return isinstance(child, LinearMixin) or (
        child is not None and is_accelerated(child) and is_linear_layer(child)
    )


def _can_be_shared(child: nn.Module | None) -> bool:
    return child is not None and _has_adapters(child) and own_product(child) is None


def _group_siblings(module: nn.Module, linears: dict[str, tuple[int, int]]) -> None:
    adapted = tuple(name for name in linears if _can_be_shared(module._modules[name]))
    other_code = is_replaced(module) and not gated.is_ours(module)
    runs = () if other_code else called_together(type(module), adapted)
    runs = tuple(run for run in runs if len({linears[name][0] for name in run}) == 1)
    if not runs:
        return
    known: shared.Siblings | None = module.__dict__.get(shared.ATTRIBUTE)
    if known is None or known.names != adapted:
        known = module.__dict__[shared.ATTRIBUTE] = shared.Siblings(module, adapted, runs)
    for name in adapted:
        child = module._modules[name]
        assert child is not None
        if (holder := _holder(child)) is not None:
            holder.siblings = (known, name)


def _holder(child: nn.Module) -> Any:
    """What carries a layer's place among its siblings."""
    if isinstance(child, LinearMixin):
        return child
    return child.__dict__[LAYER_ATTRIBUTE] if is_accelerated(child) else None
