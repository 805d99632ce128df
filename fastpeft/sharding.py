"""Parameters that FSDP2 shards over processes (DTensors): gathered for a file, filled from one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them is a DTensor."""
    return any(hasattr(parameter, "full_tensor") for parameter in parameters)


def whole(parameter: Any) -> Tensor:
    """Return a copy in host memory, gathered from all ranks where it is sharded: a collective call."""
    value: Tensor = parameter.detach()
    if is_sharded([value]):
        value = parameter.detach().full_tensor()
    return value.to("cpu").contiguous().clone()


def gathered(parameter: Any) -> Tensor:
    """Return it whole on its own device, for autograd to follow: a collective call where it is sharded."""
    value: Tensor = parameter.full_tensor() if is_sharded([parameter]) else parameter
    return value


def copy_into(parameter: Any, value: Tensor) -> None:
    """Write a whole value into a parameter, or this rank's part of it."""
    if is_sharded([parameter]):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=parameter.device_mesh.device_type, dtype=parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        parameter.copy_(value)


def on_first_rank(act: Callable[[], None]) -> str | None:
    """Do it on the first rank alone; return, on every rank, what went wrong there."""
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except Exception as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]
