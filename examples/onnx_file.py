"""Tensors and nodes of an ONNX file, read without the onnx package: what a conversion of weights needs.

The file is one protobuf message, ModelProto. Protobuf on the wire is a row of fields, each with its number,
its kind and its value; only the fields named below are looked at (onnx/onnx.proto has them all).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import InputError

# Numbers of fields, by message.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND = 1, 2, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT = 1  # TensorProto.DataType

# Kinds of values on the wire.
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """An operation: its kind, and the names of what goes in and comes out."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read(path: Path) -> tuple[dict[str, torch.Tensor], list[Node]]:
    """Return the fp32 initialisers by name, and the nodes in the file's order.

    Raises InputError if the file is not one.
    """
    try:
        graph = next(
            value for number, value in _fields(memoryview(path.read_bytes())) if number == _MODEL_GRAPH
        )
        assert isinstance(graph, memoryview)
        tensors, nodes = {}, []
        for number, value in _fields(graph):
            if number == _GRAPH_NODE:
                assert isinstance(value, memoryview)
                nodes.append(_node(value))
            elif number == _GRAPH_INITIALIZER:
                assert isinstance(value, memoryview)
                name, tensor = _tensor(value)
                if tensor is not None:
                    tensors[name] = tensor
    except (StopIteration, IndexError, ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"{path}: not an ONNX file with weights in it ({error!r})") from error
    return tensors, nodes


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (number, value) of every field: a whole number, or the bytes of a string or a message."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == _BYTES:
            size, place = _varint(message, place)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of kind {kind} at byte {place}")
        if place + size > len(message):
            raise ValueError(f"ends at byte {len(message)}, in a field of {size}")
        yield number, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Return a number stored seven bits a byte, lowest first, and the place behind it."""
    value, shift = 0, 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _text(value: int | memoryview) -> str:
    assert isinstance(value, memoryview)
    return bytes(value).decode()


def _node(message: memoryview) -> Node:
    inputs, outputs, kind = [], [], ""
    for number, value in _fields(message):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_OUTPUT:
            outputs.append(_text(value))
        elif number == _NODE_KIND:
            kind = _text(value)
    return Node(kind, tuple(inputs), tuple(outputs))


def _tensor(message: memoryview) -> tuple[str, torch.Tensor | None]:
    """Return an initialiser's name and, if its raw bytes are fp32, its values."""
    name, raw = "", None
    shape: list[int] = []
    kind: int | memoryview = 0
    for number, value in _fields(message):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_RAW:
            raw = value
        elif number == _TENSOR_TYPE:
            kind = value
        elif number == _TENSOR_DIMS:
            if isinstance(value, int):
                shape.append(value)
                continue
            place = 0  # packed: several numbers in one field
            while place < len(value):
                size, place = _varint(value, place)
                shape.append(size)
    if kind != _FLOAT or not isinstance(raw, memoryview):
        return name, None
    values = torch.frombuffer(bytearray(raw), dtype=torch.float32) if len(raw) else torch.empty(0)
    return name, values.view(shape)
