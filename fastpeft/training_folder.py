"""The folder of a training's state: tensors as sharded safetensors, the rest in one small file.

    folder/training.pt            plain values and scalars, read with ``weights_only=True``; names the part
    folder/tensors-0a1b.../       safetensors, written by all ranks (torch.distributed.checkpoint)

A save writes a new part beside the old one, flushes it, and then replaces ``training.pt`` by one rename. So a
process that is killed at any moment leaves the old state or the new one; the part that nobody names is
cleared away by the next save.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpeft import sharding
from fastpeft.errors import BackendError, CheckpointError
from fastpeft.folder_files import flush

NAME = "training.pt"
_PART = re.compile(r"tensors-[0-9a-f]{16}")
_LARGEST = 2**28  # bytes of training.pt; it holds no tensor but scalars
_PLAIN = (type(None), bool, int, float, str)


def write(folder: Path, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Replace the folder's state; on all ranks, each with its part of the tensors.

    Args:
        folder: made if it does not exist.
        tensors: what all ranks hold, DTensors sharded, or one rank alone; written once.
        rest: plain values, the same on all ranks.

    Raises:
        CheckpointError: it cannot be written; what was there stays whole.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    writer, _ = _storage()
    part = [f"tensors-{secrets.token_hex(8)}"]
    if _is_distributed():
        dist.broadcast_object_list(part, src=0)
    path = folder / part[0]
    _on_first_rank(folder, lambda: path.mkdir(parents=True))
    with _one_error(f"save: cannot write to {folder}"), _quiet():
        save(tensors, storage_writer=writer(str(path), save_distributed=True), no_dist=not _is_distributed())
    _on_first_rank(folder, lambda: _commit(folder, path, rest))


def read(folder: Path) -> dict[str, Any]:
    """Return what ``training.pt`` holds besides the tensors.

    Raises:
        CheckpointError: it is missing, damaged or no such file.
    """
    file = folder / NAME
    if not file.exists():
        raise CheckpointError(f"load: {folder} has no {NAME}; fastpeft.save_training writes it")
    status = file.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
        raise CheckpointError(f"load: {file} is no regular file of at most {_LARGEST:,} bytes")
    with _one_error(f"load: {file} is damaged or holds more than plain values"):
        found = torch.load(file, map_location="cpu", weights_only=True)
    part = found.get("part") if isinstance(found, dict) else None
    if not isinstance(part, str) or not _PART.fullmatch(part) or not isinstance(found.get("rest"), dict):
        raise CheckpointError(f"load: {file} was not written by fastpeft.save_training")
    return {**found["rest"], "part": part}


def fill(folder: Path, part: str, tensors: dict[str, Tensor]) -> None:
    """Read tensors into those given, each this rank's part of it; on all ranks.

    Raises:
        CheckpointError: one is missing, of another size, or damaged.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    _, reader = _storage()
    path = folder / part
    if not path.is_dir():
        raise CheckpointError(f"load: {folder} has no folder {part}, which its {NAME} names")
    with _one_error(f"load: {path} does not hold what {NAME} says"), _quiet():
        load(tensors, storage_reader=reader(str(path)), no_dist=not _is_distributed())


def check_plain(value: Any, where: str) -> None:
    """Refuse what ``weights_only=True`` would not read again.

    Raises:
        CheckpointError: it names the place.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_plain(key, f"{where}, a key")
            check_plain(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            check_plain(inner, f"{where}[{place}]")
    elif not isinstance(value, (*_PLAIN, Tensor)):
        raise CheckpointError(
            f"{where}: expected numbers, texts, tensors and lists or dicts of them, "
            f"got {type(value).__name__}"
        )


def _commit(folder: Path, path: Path, rest: dict[str, Any]) -> None:
    """Make the new part the folder's state."""
    scratch = folder / f".{NAME}-{path.name}"
    torch.save({"part": path.name, "rest": rest}, scratch)
    for written in (*path.iterdir(), path, scratch):
        flush(written)
    scratch.replace(folder / NAME)
    flush(folder)
    for left in folder.iterdir():
        if _PART.fullmatch(left.name) and left.name != path.name:
            shutil.rmtree(left, ignore_errors=True)
        elif left.name.startswith(f".{NAME}-"):
            left.unlink(missing_ok=True)


def _on_first_rank(folder: Path, act: Any) -> None:
    """Do it once; raise on every rank what went wrong there."""
    if not _is_distributed():
        with _one_error(f"save: cannot write to {folder}"):
            act()
    elif error := sharding.on_first_rank(act):
        raise CheckpointError(f"save: cannot write to {folder}: {error}")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _storage() -> tuple[Any, Any]:
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
    except ImportError:
        raise BackendError(
            f"save_training and load_training need torch 2.8 or newer, which shards safetensors files; "
            f"this is {torch.__version__}"
        ) from None
    return HuggingFaceStorageWriter, HuggingFaceStorageReader


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        inner = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
        lines = str(inner).strip().splitlines() or [type(inner).__name__]
        raise CheckpointError(f"{what}: {lines[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
