"""Adapters that stand beside a module, on its output, by a hook: what they share, on and off."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from fastpeft.errors import ShapeError


class AttachedAdapter(nn.Module):
    """An adapter of one module's output.

    Attributes:
        child: its name in the module that it is on.
        in_series: whether it takes the module's output alone, or its input too.
        response: what is added is multiplied by it for the moment (fastpeft.sparse.suppression).
        adapters_enabled: whether it is asked at all.
    """

    child: ClassVar[str]
    in_series: bool = False
    response: Tensor | None = None
    adapters_enabled: bool = True

    @abstractmethod
    def forward(self, output: Tensor, given: Tensor | None = None) -> Tensor:
        """Return the module's output [..., out_features] with the adapter.

        Args:
            output: the module's.
            given: its input [..., in_features]; None in series.
        """


def attach(module: nn.Module, adapter: AttachedAdapter) -> None:
    """Put an adapter on a module's output."""
    module.add_module(adapter.child, adapter)
    module.register_forward_hook(partial(_adapted, adapter.child), with_kwargs=True)


def detach(module: nn.Module, child: str) -> None:
    """Undo :func:`attach`."""
    del module._modules[child]
    for identity in [i for i, hook in module._forward_hooks.items() if _is_of(hook, child)]:
        del module._forward_hooks[identity]
        module._forward_hooks_with_kwargs.pop(identity, None)


def _is_of(hook: Any, child: str) -> bool:
    return isinstance(hook, partial) and hook.func is _adapted and hook.args == (child,)


def _adapted(
    child: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Return the output, or the first tensor of a tuple of them, with the adapter."""
    adapter: Any = module._modules[child]
    if not adapter.adapters_enabled:
        return output
    given = None if adapter.in_series else _first_tensor((*args, *kwargs.values()), module, "input")
    if isinstance(output, Tensor):
        return adapter(output, given)
    if isinstance(output, tuple):
        return (adapter(_first_tensor(output[:1], module, "output"), given), *output[1:])
    raise ShapeError(
        f"{adapter}: expected {type(module).__name__} to return a tensor or a tuple that begins with one, "
        f"got {type(output).__name__}"
    )


def _first_tensor(values: tuple[Any, ...], module: nn.Module, what: str) -> Tensor:
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise ShapeError(f"the adapter on {type(module).__name__} found no tensor in its {what}")
