"""The most bytes of tensors alive at one moment, counted exactly, on any device."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fastpeft.planning.storages import Storage, Storages


class PeakBytes(Storages):  # type: ignore[no-untyped-call]
    """Bytes alive now (`live`) and at most (`peak`) inside the `with` block, the tensors `alive` included."""

    def __init__(self, alive: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        for tensor in alive:
            self.see(tensor)

    def changed(self, storage: Storage, change: int) -> None:
        """The peak moves with every storage."""
        self.peak = max(self.peak, self.live)
