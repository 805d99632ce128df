"""Bytes that a forward pass keeps alive for backward, counted exactly.

Two counters that must agree: `SavedBytes` asks autograd, through its saved-tensor hooks, and `LiveBytes`
asks the allocator's side, by watching which storages made during the forward pass outlive it. The second
also sees a tensor that an autograd Function hides in a plain attribute of its context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Saved:
    """What autograd holds in place of a saved tensor, and drops together with the graph node."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Sum over distinct storages that autograd holds for backward, less those in `exclude`.

    A view counts as its whole storage, because that is what it keeps alive. What belongs to a part of the
    graph that was dropped again does not count: PEFT's DoRA norm saves much and is then detached. So the
    result must be kept alive until `bytes()` is called.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self._excluded = {_key(tensor) for tensor in exclude}
        self._held: weakref.WeakSet[_Saved] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def _pack(self, tensor: Tensor) -> _Saved:
        held = _Saved(tensor)
        self._held.add(held)
        return held

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def bytes(self) -> int:
        """Bytes held now."""
        sizes = {_key(held.tensor): held.tensor.untyped_storage().nbytes() for held in self._held}
        return sum(size for key, size in sizes.items() if key not in self._excluded)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of storages that operators returned inside the `with` block and that still live."""

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._excluded = {_key(tensor) for tensor in exclude}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                ref = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._seen[_key(leaf)] = (ref, storage.nbytes())
        return result

    def bytes(self) -> int:
        """Bytes alive now."""
        alive = 0
        for key, (ref, size) in self._seen.items():
            expired = ref.expired()  # type: ignore[no-untyped-call]
            alive += 0 if expired or key in self._excluded else size
        return alive


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def state_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers: alive anyway, so not counted."""
    return [*model.parameters(), *model.buffers()]


def count(forward: Callable[[], Any], exclude: Iterable[Tensor]) -> tuple[int, int]:
    """(saved, live) bytes of one forward pass, each from a run of its own.

    `forward` returns a tensor, or a tuple of them. Only the graph is held when the live bytes are read, not
    the result, so that an output counts only if backward needs it.
    """
    excluded = list(exclude)
    with SavedBytes(excluded) as saved:
        nodes = _graph(forward())
    if not nodes:
        raise ValueError("the forward pass built no graph, so nothing can be saved for backward")
    bytes_saved = saved.bytes()
    del nodes
    with LiveBytes(excluded) as live:
        nodes = _graph(forward())
    bytes_live = live.bytes()
    del nodes
    return bytes_saved, bytes_live


def _graph(result: Any) -> list[Any]:
    return [leaf.grad_fn for leaf in tree_leaves(result) if leaf.grad_fn is not None]
