"""Every storage from its first operation to its last reference, and the bytes of those that live.

A dispatch mode sees real, fake and meta tensors alike, on any device. Storages are counted, not tensors (a
view costs nothing), at their exact sizes, without what an allocator adds for alignment or fragmentation. What
an ATen kernel allocates and frees within one call is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(slots=True, eq=False)
class Storage:
    """One storage: its size, and where and when it came to be.

    Attributes:
        bytes: its size.
        phase: of the step, in which it was made.
        module: path of the innermost module whose forward or backward made it; ``""`` outside all.
        kind: ``"weights"``, ``"gradients"``, ``"optimizer_state"``, ``"caches"`` or ``"activations"`` once it
            is known to be that.
        is_any: whether it holds the result of ``any()``.
    """

    bytes: int
    phase: str = ""
    module: str = ""
    kind: str = "temporaries"
    is_any: bool = False


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what operators return in the ``with`` block, and what :meth:`see` is given; holds none of it.

    Attributes:
        live: bytes alive now.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        # By the storage's address, which is free for another one only after the callback. The Python object
        # of a storage lives as long as the storage does.
        self._storages: dict[int, tuple[weakref.ref[Any], Storage]] = {}

    def made(self, size: int) -> Storage:
        """Return the record of a storage that is new."""
        return Storage(size)

    def changed(self, storage: Storage, change: int) -> None:
        """Called after a storage was made, resized in place or freed, with the difference in bytes."""

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor's storage is followed already."""
        return int(tensor.untyped_storage()._cdata) in self._storages

    def all_living(self) -> list[Storage]:
        """Return the storages that live."""
        return [storage for _, storage in self._storages.values()]

    def see(self, tensor: Tensor) -> Storage:
        """Follow a tensor's storage from now on."""
        storage = tensor.untyped_storage()
        key, size = int(storage._cdata), storage.nbytes()
        known = self._storages.get(key)
        if known is not None:
            entry = known[1]
            if entry.bytes != size:
                change, entry.bytes = size - entry.bytes, size
                self.live += change
                self.changed(entry, change)
            return entry
        entry = self.made(size)
        self._storages[key] = (weakref.ref(storage, lambda _: self._gone(key)), entry)
        self.live += size
        self.changed(entry, size)
        return entry

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see_all(result)
        return result

    def _see_all(self, result: Any) -> None:
        if isinstance(result, Tensor):
            self.see(result)
        elif isinstance(result, (list, tuple)):
            for entry in result:
                self._see_all(entry)

    def _gone(self, key: int) -> None:
        _, storage = self._storages.pop(key)
        self.live -= storage.bytes
        self.changed(storage, -storage.bytes)
