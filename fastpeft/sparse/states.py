"""An optimiser's state of parameters that do not train now: thrown away, kept aside, or in host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.sparse.schedule import Policy

State = dict[str, Any]


class Aside:
    """States taken out of an optimiser's ``state`` until their parameters train again."""

    def __init__(self, optimizer: torch.optim.Optimizer, policy: Policy) -> None:
        self._optimizer = optimizer
        self._policy = policy
        self._states: dict[nn.Parameter, State] = {}
        self._copying: list[torch.cuda.Event] = []  # ends of copies to the host that nobody has waited for

    def put(self, parameter: nn.Parameter) -> None:
        """Take a parameter's state out of the optimiser's."""
        state: State | None = self._optimizer.state.pop(parameter, None)
        if state and self._policy == "keep":
            self._states[parameter] = state
        elif state and self._policy == "offload":
            self._states[parameter] = {key: _to_host(value) for key, value in state.items()}
            # The device's own work follows the copies in its order; only a reader on the host has to wait.
            devices = {v.device for v in state.values() if isinstance(v, Tensor) and v.is_cuda}
            self._copying += [_event(device) for device in devices]

    def take(self, parameter: nn.Parameter) -> None:
        """Give a parameter's state back to the optimiser, on the parameter's device."""
        state = self._states.pop(parameter, None)
        if state is not None:
            self._optimizer.state[parameter] = {k: _to_device(k, v, parameter) for k, v in state.items()}

    def get(self, parameter: nn.Parameter) -> State | None:
        """Return a parameter's state if it is here."""
        self._wait()
        return self._states.get(parameter)

    def lend(self) -> None:
        """Put every state into the optimiser's for a moment: it is about to be written down."""
        self._wait()
        for parameter, state in self._states.items():
            # Beside what others lend (fastpeft.allocation).
            self._optimizer.state[parameter] = {**self._optimizer.state.get(parameter, {}), **state}

    def end_loan(self) -> None:
        """Take them out again."""
        for parameter in self._states:
            self._optimizer.state.pop(parameter, None)

    def forget(self) -> None:
        """Throw all away."""
        self._states.clear()
        self._copying.clear()

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are kept aside."""
        self._wait()
        return [v for state in self._states.values() for v in state.values() if isinstance(v, Tensor)]

    def _wait(self) -> None:
        for event in self._copying:
            event.synchronize()
        self._copying.clear()


def _event(device: torch.device) -> torch.cuda.Event:
    """An event of everything that was given to the device's current stream so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _to_host(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return value
    # Pinned, so that both ways can run beside the computation.
    host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)
    return host.copy_(value, non_blocking=True)


def _to_device(key: str, value: Any, parameter: nn.Parameter) -> Any:
    # torch keeps `step` in host memory by choice (unless capturable or fused, where it was there already).
    if not isinstance(value, Tensor) or (key == "step" and not value.is_pinned()):
        return value
    return value.to(parameter.device, non_blocking=True)
