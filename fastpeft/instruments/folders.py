"""Magnitude and direction between two checkpoints, read from their safetensors a few rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastpeft.errors import CheckpointError, ConfigError
from fastpeft.instruments.directions import Change, Names, Per, change, check, compare_names
from fastpeft.targets import matches

_FLOATING = ("F16", "BF16", "F32", "F64")
_SUFFIX = ".weight"


def changes_between_folders(
    before: str | Path, after: str | Path, *, names: Names = None, per: Per = "column"
) -> list[Change]:
    """Return the change of every weight matrix from one model folder to another.

    No tensor is ever whole in memory: both are read a few rows at a time.

    Args:
        before: a folder with one or more ``*.safetensors`` files of a model, or one such file.
        after: the same model later.
        names: names or dotted suffixes of modules, or one regular expression; default: every matrix whose
            name has a number in it, which is what is in blocks. (A file does not say what a matrix is for:
            GPT-2's are [in_features, out_features], where rows and columns change places.)
        per: as in :mod:`fastpeft.instruments.directions`.

    Raises:
        CheckpointError: a folder or file cannot be read.
        ConfigError: the weights differ in name or shape, or none is meant.
    """
    check(per)
    with _Folder(before, names) as first, _Folder(after, names) as second:
        compare_names(first.slices, second.slices, names)
        return [_compared(path, old, second.slices[path], per) for path, old in first.slices.items()]


def _compared(path: str, old: Any, new: Any, per: Per) -> Change:
    shapes = [tuple(part.get_shape()) for part in (old, new)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{path}: expected one shape, got {list(shapes[0])} before and {list(shapes[1])} after"
        )
    rows, columns = shapes[0]
    try:
        return change(path, (rows, columns), lambda a, b: old[a:b], lambda a, b: new[a:b], per)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


class _Folder:
    """The matrices of a folder's files that are meant, by their modules' paths; open until it is left."""

    def __init__(self, folder: str | Path, names: Names) -> None:
        self._path = Path(folder)
        self._names = names if names is None or isinstance(names, str) else tuple(names)
        self._files: list[Any] = []
        self.slices: dict[str, Any] = {}

    def __enter__(self) -> _Folder:
        files = sorted(self._path.glob("*.safetensors")) if self._path.is_dir() else [self._path]
        if not files or not all(file.is_file() for file in files):
            what = "holds no *.safetensors" if self._path.is_dir() else "does not exist"
            raise CheckpointError(f"expected a folder with safetensors files: {self._path} {what}")
        for path in files:
            try:
                file: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
            self._files.append(file.__enter__())
            for name in file.keys():  # noqa: SIM118  # it is no dict
                part = file.get_slice(name)
                module = name.removesuffix(_SUFFIX)
                if module != name and len(part.get_shape()) == 2 and self._is_meant(module):
                    if part.get_dtype() not in _FLOATING:
                        raise ConfigError(f"{name}: expected a floating dtype, got {part.get_dtype()}")
                    self.slices[module] = part
        return self

    def __exit__(self, *error: Any) -> None:
        self.slices.clear()
        for file in self._files:
            file.__exit__(*error)

    def _is_meant(self, module: str) -> bool:
        if self._names is None:
            return any(part.isdigit() for part in module.split("."))
        return matches(self._names, module)
