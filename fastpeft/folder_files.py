"""The two files of an adapter folder: written so that no crash leaves half of an adapter, read as if hostile.

Writing: the files are made in a scratch folder inside and flushed to the disk. Then

- where the configuration stays, as in a training's every save but the first, the weights alone are renamed;
- where it changes, the folder changes places with one that holds both new files (:mod:`fastpeft.exchange`);
- where that cannot be, the old configuration goes into the scratch folder, the new weights take their place,
  then the new configuration. Until then PEFT finds no configuration and refuses the folder; reading here
  finds the one that belongs to the weights, and the next save puts it in its place.

So a folder holds one adapter whole after a kill at any moment, the old one or the new one, and nobody reads
the weights of the one with the configuration of the other.

Reading: only regular files of sane size, JSON and safetensors. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import glob
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

from fastpeft import exchange
from fastpeft.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_SCRATCH = ".saving-"
_OLD_CONFIG = "old_config.json"  # in a scratch folder: that of the weights that are still in their place
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
            flush(scratch / WEIGHTS_NAME)
            if _holds(path / CONFIG_NAME, config):
                (scratch / WEIGHTS_NAME).replace(path / WEIGHTS_NAME)
            else:
                (scratch / CONFIG_NAME).write_text(config, encoding="utf-8")
                flush(scratch / CONFIG_NAME)
                flush(scratch)
                _put_both(scratch, path)
            flush(path)
        finally:
            with contextlib.suppress(OSError):  # the scratch folder stays, and reading finds what it holds
                _settle(scratch, path)
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
    file = next(filter(None, map(_pending, _scratches(path))), path / CONFIG_NAME)
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


def _holds(file: Path, text: str) -> bool:
    content = text.encode()
    return _is_regular(file) and file.stat().st_size == len(content) and file.read_bytes() == content


def _put_both(scratch: Path, path: Path) -> None:
    """Replace both files; without a configuration there is no adapter yet that a kill could leave whole."""
    has_adapter = (path / CONFIG_NAME).exists()
    if has_adapter and exchange.put_in_place(scratch, path, (WEIGHTS_NAME, CONFIG_NAME), _beside(path)):
        flush(path.resolve().parent)
        return
    if has_adapter:
        (path / CONFIG_NAME).replace(scratch / _OLD_CONFIG)
        flush(path)  # a crash of the machine, too, finds these three in their order
    (scratch / WEIGHTS_NAME).replace(path / WEIGHTS_NAME)
    flush(path)
    (scratch / CONFIG_NAME).replace(path / CONFIG_NAME)


def _pending(scratch: Path) -> Path | None:
    """The configuration of the weights in place, where a save was killed while it was in the scratch one."""
    is_replaced = not (scratch / WEIGHTS_NAME).exists()
    file = scratch / (CONFIG_NAME if is_replaced else _OLD_CONFIG)
    return file if file.exists() else None


def _scratches(path: Path) -> list[Path]:
    return sorted(path.glob(f"{_SCRATCH}*"))


def _beside(path: Path) -> str:
    return f"{_SCRATCH}{path.resolve().name}-"


def _finish_interrupted(path: Path) -> None:
    """Put the configuration of an interrupted save in its place, and clear away what others left."""
    for scratch in _scratches(path):
        _settle(scratch, path)
    for leftover in path.resolve().parent.glob(f"{glob.escape(_beside(path))}{'[0-9a-f]' * 16}"):
        shutil.rmtree(leftover, ignore_errors=True)


def _settle(scratch: Path, path: Path) -> None:
    if (config := _pending(scratch)) is not None:
        config.replace(path / CONFIG_NAME)
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
