"""The most bytes of tensors alive at one moment, counted exactly, on any device.

Every storage that an operator returns is counted from then until it is freed. What a kernel allocates for
itself and frees before it returns is not seen, nor what Python alone holds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes alive now (`live`) and at most (`peak`) inside the `with` block, the tensors `alive` included.

    It holds none of them.
    """

    def __init__(self, alive: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in alive:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = int(storage._cdata), storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            if known[1] == size:
                return
            self._gone(key)  # resized in place
        # The Python object of a storage lives as long as the storage does.
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key)), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        entry = self._known.pop(key, None)
        if entry is not None:
            self.live -= entry[1]
