"""A GPU that is not there: says which tests would give kernels, or operators, tensors left on the CPU.

``FASTPEFT_TEST_FAKE_GPU=1 python -m pytest tests/kernels tests/ops`` runs the tests in the interpreter, on
CPU tensors, and fails one that

- launches a kernel on a tensor that was made without a device,
- mixes such a tensor with others in an operator, which a GPU refuses,
- draws on the device from a CPU generator, which torch refuses,
- counts in the interpreter without the marker ``interpreted``; tests that have it are skipped, as on a GPU.

A tensor made by ``torch.randn(3)`` is "on the CPU", and so is what is computed of it, until ``.to(DEVICE)``
or ``device=DEVICE``. What compiles is skipped where it does: Dynamo does not trace through the mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench import launch_traffic
from tests.device import DEVICE
from tests.kernels import interpreter

# Made of nothing but sizes and numbers: where they lie is for the caller to say.
FACTORIES = {
    getattr(torch, name)
    for name in (
        *("arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
        *("randperm", "tensor", "zeros"),
    )
}
# Take tensors of two devices.
MOVING = {Tensor.copy_, Tensor.to, Tensor.__setitem__, Tensor.__getitem__, Tensor.index_select}


class WrongDeviceError(AssertionError):
    """On a machine with a GPU, this test would fail."""


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class FakeGpu(TorchFunctionMode):
    """Knows of every tensor whether it was left on the CPU; all else is taken to be on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[
            int, Tensor
        ] = {}  # by storage; the tensors keep their addresses from being used again

    def is_left(self, tensor: Tensor) -> bool:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False  # it has no storage of its own
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self.left

    def leave(self, result: Any) -> None:
        for tensor in _tensors(result):
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            if tensor.device.type == "cpu" and tensor.numel() and not wrapped:
                self.left[tensor.untyped_storage().data_ptr()] = tensor.detach()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(torch.device("cpu", 0) == value for value in (*args, *kwargs.values()) if _is_device(value)):
            return self.on_the_device(function, args, kwargs)
        if function in FACTORIES:
            result = function(*args, **kwargs)
            if kwargs.get("device") is None:
                self.leave(result)
            return result
        given = [t for t in _tensors((args, kwargs)) if t.numel() and t.dim()]
        with torch._C.DisableTorchFunctionSubclass():
            left = [t for t in given if self.is_left(t)]
        if not left:
            return function(*args, **kwargs)
        if len(left) < len(given) and function not in MOVING and _computes(function):
            shapes = [list(t.shape) for t in left]
            raise WrongDeviceError(f"{function.__name__}: tensors left on the CPU, {shapes}, beside others")
        result = function(*args, **kwargs)
        if function not in MOVING or len(left) == len(given):
            self.leave(result)
        return result

    def on_the_device(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise WrongDeviceError(f"{function.__name__}: a CPU generator for a tensor on the device")
        result = function(*args, **kwargs)
        return result.clone() if function is Tensor.to else result  # at an address of its own


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device)


def _computes(function: Any) -> bool:
    """Whether it is an operator, not a property's getter or a question."""
    return getattr(function, "__name__", "") not in ("__get__", "__set__", "is_set_to", "data_ptr")


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, a kernel takes what was put on the device, and nobody looks into the interpreter."""
    mode = FakeGpu()
    executor = interpreter.interpreter.GridExecutor
    launch = executor.__call__

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        values = [*arguments, *keywords.values()]
        values += [value.base for value in values if hasattr(value, "block_shape")]  # a descriptor's tensor
        with torch._C.DisableTorchFunction():
            for tensor in _tensors(values):
                if tensor.numel() and mode.is_left(tensor):
                    raise WrongDeviceError(f"{self.fn.__name__} on a CPU tensor {list(tensor.shape)}")
            return launch(self, *arguments, **keywords)

    def refuse(*_: Any, **__: Any) -> Any:
        raise WrongDeviceError("counts in the interpreter without the marker `interpreted`")

    def skip(*_: Any, **__: Any) -> Any:
        pytest.skip("compiles, which a fake GPU does not see")

    assert DEVICE.index == 0
    with (
        mock.patch.object(executor, "__call__", call),
        mock.patch.object(launch_traffic, "_counting", refuse),
        mock.patch.object(torch, "compile", skip),
        mock.patch.object(torch.library, "opcheck", skip),
        mode,
    ):
        yield
