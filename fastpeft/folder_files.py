"""The two files of an adapter folder: written so that no crash leaves half of an adapter, read as if hostile.

Writing: both files are made in a scratch folder inside, flushed to the disk, and renamed, the weights first.
A process that is killed before leaves the old adapter; one that is killed between the two renames leaves the
new weights, and the new configuration still in the scratch folder, where reading finds it and the next save
puts it in its place. So a folder always holds one adapter whole, the old one or the new one.

Reading: only regular files of sane size, JSON and safetensors. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpeft.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_SCRATCH = ".saving-"
_LARGEST_CONFIG = 16 * 2**20  # bytes; PEFT's are a few thousand
T = TypeVar("T")


def write(path: Path, tensors: dict[str, Tensor], config: str) -> None:
    """Replace the folder's adapter; the folder is made if it does not exist.

    Raises:
        CheckpointError: it cannot be written; what was there stays whole.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _finish_interrupted(path)
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=path))
        try:
            save_file(tensors, scratch / WEIGHTS_NAME, metadata={"format": "pt"})
            (scratch / CONFIG_NAME).write_text(config, encoding="utf-8")
            for file in (scratch / WEIGHTS_NAME, scratch / CONFIG_NAME, scratch):
                flush(file)
            (scratch / WEIGHTS_NAME).replace(path / WEIGHTS_NAME)
            (scratch / CONFIG_NAME).replace(path / CONFIG_NAME)
            flush(path)
        finally:
            if not _is_between_renames(scratch):
                _discard(scratch)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"save: cannot write to {path}: {error}") from error


def read_config(path: Path) -> dict[str, object]:
    """Return the content of the folder's ``adapter_config.json``.

    Raises:
        CheckpointError: it is missing, damaged, too large, or no JSON object.
    """
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"load: {path} {what}; expected a folder with {CONFIG_NAME}")
    interrupted = _interrupted(path)
    file = path / CONFIG_NAME if interrupted is None else interrupted / CONFIG_NAME
    if _is_regular(file) and file.stat().st_size > _LARGEST_CONFIG:
        raise CheckpointError(f"{file}: {file.stat().st_size:,} bytes, expected at most {_LARGEST_CONFIG:,}")
    content = _read(file, lambda: json.loads(file.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the folder's ``adapter_model.safetensors``.

    Raises:
        CheckpointError: it is missing or damaged, or there is only a pickle.
    """
    file = path / WEIGHTS_NAME
    if not file.exists() and (path / "adapter_model.bin").exists():
        raise CheckpointError(
            f"load: {path} holds only adapter_model.bin, a pickle, which fastpeft never reads; "
            f"save it again as {WEIGHTS_NAME}"
        )
    return _read(file, lambda: load_file(file))


def _read(file: Path, reader: Callable[[], T]) -> T:
    if not file.exists():
        raise CheckpointError(f"load: {file.parent} has no {file.name}")
    if not _is_regular(file):
        raise CheckpointError(f"load: {file} is not a regular file")
    try:
        return reader()
    except RecursionError:
        raise CheckpointError(f"load: {file} is nested too deeply") from None
    except (OSError, ValueError, OverflowError, MemoryError, SafetensorError) as error:
        raise CheckpointError(f"load: {file} is damaged or cut short: {error}") from error


def _is_regular(file: Path) -> bool:
    """Not a folder, a pipe or a device, behind a link either: reading those may never end."""
    return file.exists() and stat.S_ISREG(file.stat().st_mode)


def _is_between_renames(scratch: Path) -> bool:
    return (scratch / CONFIG_NAME).exists() and not (scratch / WEIGHTS_NAME).exists()


def _interrupted(path: Path) -> Path | None:
    """The scratch folder of a save that was killed between its two renames."""
    return next((s for s in sorted(path.glob(f"{_SCRATCH}*")) if _is_between_renames(s)), None)


def _finish_interrupted(path: Path) -> None:
    """Put the configuration of an interrupted save in its place, and clear away what others left."""
    if (scratch := _interrupted(path)) is not None:
        (scratch / CONFIG_NAME).replace(path / CONFIG_NAME)
    for leftover in path.glob(f"{_SCRATCH}*"):
        _discard(leftover)


def _discard(scratch: Path) -> None:
    # The configuration first: one without weights is what an interrupted save looks like.
    (scratch / CONFIG_NAME).unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
