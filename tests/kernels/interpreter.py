"""Repairs of and checks inside Triton's interpreter. Nothing here touches a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

ACTIVE = bool(knobs.runtime.interpret)
Builder = interpreter.InterpreterBuilder


def _bf16_to_fp32(data: Any) -> Any:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16(data: Any) -> Any:
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


ORIGINAL_DOT, ORIGINAL_CAST = Builder.create_dot, Builder.cast_impl


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    a, b = (
        interpreter.TensorHandle(_bf16_to_fp32(operand.data), tl.float32)
        if operand.dtype.scalar == tl.bfloat16
        else operand
        for operand in (a, b)
    )
    return ORIGINAL_DOT(self, a, b, d, *rest)


def _cast(self: Any, source: Any, to: Any) -> Any:
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_fp32_to_bf16(source.data), tl.bfloat16)
    return ORIGINAL_CAST(self, source, to)


def hasten() -> None:
    """Take away what the interpreter does over and over, which is half of the time of a kernel's test.

    It looks for all that is to be replaced in Triton's language at every launch and at every call of a device
    function, and takes only some of it back; here it is replaced once and stays. It makes a table of types
    whenever it asks for one of them. And it checks and wraps a block's shape for every value: here once for
    every shape.
    """
    replaced = False
    patch = interpreter._patch_lang

    def patch_once(fn: Any) -> Any:
        nonlocal replaced
        if not replaced:
            replaced = True
            patch(FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core}))
        return interpreter._LangPatchScope()

    of_scalar = cache(interpreter._get_np_dtype)

    def np_dtype(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else of_scalar(element)

    block_type_init = tl.block_type.__init__

    @cache
    def checked(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
        like = object.__new__(tl.block_type)
        block_type_init(like, tl.int32, list(sizes))
        return like.shape, like.numel, str(like.shape)

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        sizes = shape.values if isinstance(shape, tl.tuple) else shape
        self.shape, self.numel, text = checked(
            tuple(s.value if type(s) is tl.constexpr else s for s in sizes)
        )
        self.name = f"<{text}, {element_ty}>"

    @cache
    def wrapped(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def tensor_init(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = wrapped(tuple(kind.shape.values) if kind.is_block() else ())

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init


@contextmanager
def mended() -> Iterator[None]:
    """Repair the two faults of Triton 3.9.0's interpreter in bf16, so that bf16 kernels are really tested.

    `tl.dot` multiplies the raw 16-bit patterns as integers: convert the operands to fp32, in which a
    product of bf16 is exact, as a tensor core does. And a cast from fp32 drops bits where a GPU rounds to
    nearest even.
    """
    with mock.patch.object(Builder, "create_dot", _dot), mock.patch.object(Builder, "cast_impl", _cast):
        yield


@contextmanager
def permuted_programs(seed: int) -> Iterator[None]:
    """Run the programs of every grid in a random order, or for seed 0 from the last to the first.

    A GPU promises no order. The interpreter's own is always the same, so that in it a sum by the order of
    arrival would be repeatable. Programs that wait for one another would not end; ours never do.
    """
    set_dim, set_index = Builder.set_grid_dim, Builder.set_grid_idx
    order: Any = None

    def set_grid_dim(self: Any, *dims: int) -> None:
        nonlocal order
        count = int(np.prod(dims))
        order = np.random.default_rng(seed + count).permutation(count) if seed else np.arange(count)[::-1]
        set_dim(self, *dims)

    def set_grid_idx(self: Any, *index: int) -> None:
        place = order[np.ravel_multi_index(index, self.grid_dim)]
        set_index(self, *(int(i) for i in np.unravel_index(place, self.grid_dim)))

    with (
        mock.patch.object(Builder, "set_grid_dim", set_grid_dim),
        mock.patch.object(Builder, "set_grid_idx", set_grid_idx),
    ):
        yield


class OutOfBoundsError(AssertionError):
    """A kernel touched an address that belongs to no element of its tensor arguments."""


def element_addresses(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Addresses of every element of `tensor`, strides and all: bytes between the elements do not count."""
    address = np.full((), tensor.data_ptr(), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        address = address[..., None] + np.arange(size, dtype=np.int64) * stride * tensor.element_size()
    return np.unique(address)


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Raise OutOfBoundsError on a load or store outside the elements of the launch's tensor arguments.

    Stricter than a page fault or a NaN guard: a stray load whose value is masked away later is found too.
    """
    load, store, call = (
        Builder.create_masked_load,
        Builder.create_masked_store,
        interpreter.GridExecutor.__call__,
    )
    allowed = np.empty(0, dtype=np.int64)

    def check(kind: str, pointers: Any, mask: Any) -> None:
        # A mask and a scalar condition make a mask of integers, which would index instead of select; a
        # descriptor's mask is a bare array, whose `data` is a buffer.
        kept = np.asarray(mask.data).astype(bool)
        touched = np.broadcast_to(pointers.data, kept.shape)[kept].astype(np.int64)
        stray = touched[~np.isin(touched, allowed)]
        if stray.size:
            raise OutOfBoundsError(
                f"{kind} of {stray.size} elements outside the arguments, first at {stray[0]:#x}"
            )

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest, **keywords)

    def create_masked_store(
        self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **keywords: Any
    ) -> Any:
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **keywords)

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal allowed
        values = [*arguments, *keywords.values()]
        values += [entry for value in values if isinstance(value, tuple) for entry in value]
        values += [value.base for value in values if hasattr(value, "block_shape")]  # a descriptor's tensor
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        allowed = np.unique(np.concatenate([element_addresses(tensor) for tensor in tensors]))
        return call(self, *arguments, **keywords)

    with (
        mock.patch.object(Builder, "create_masked_load", create_masked_load),
        mock.patch.object(Builder, "create_masked_store", create_masked_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", run),
    ):
        yield
