"""The file that keeps measured times between processes: ``choices-<version>.json`` in the cache folder.

The folder is ``$FASTPEFT_CACHE_DIR``, else ``~/.cache/fastpeft``. The version in the file's name and contents
is made of fastpeft's, torch's and triton's versions and the sources of the kernels and their tables, so that
what was measured with other code is not found.

It is only a memory: a file that cannot be read, understood or written costs one warning and a measurement.
Processes may share it: it is replaced whole (``os.replace``), after taking in what others wrote meanwhile; of
two that write in the same instant one loses its entry, and measures again another time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import tempfile
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastpeft._version import __version__

FOLDER_VARIABLE = "FASTPEFT_CACHE_DIR"
MAX_BYTES = 2**20  # about 5,000 entries
Times = dict[str, dict[str, float]]


class ChoiceFile:
    """Times by entry (op, device and shape bucket, as text), each a time by candidate."""

    def __init__(self) -> None:
        self._entries: Times | None = None
        self._warned = False

    def read(self) -> Times:
        """Return what the file held when it was first read, and what was added since."""
        if self._entries is None:
            self._entries = self._load()
        return self._entries

    def add(self, entry: str, times: dict[str, float]) -> None:
        """Remember an entry and write the file."""
        self._entries = {**self._load(), **self.read(), entry: times}
        text = json.dumps({"version": version_key(), "entries": self._entries}, indent=1)
        temporary = None
        try:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # a name without its contents would survive a crash
            os.replace(temporary, path)
        except OSError as error:
            self._ignored(f"cannot be written: {error}")
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _load(self) -> Times:
        try:
            path = self._path()
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return self._ignored("is not a regular file")
            if status.st_size > MAX_BYTES:
                return self._ignored(f"has {status.st_size} bytes, expected at most {MAX_BYTES}")
            return _entries_of(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}
        except OSError as error:
            return self._ignored(f"cannot be read: {error}")
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or not ours
            return self._ignored(f"is not one of this version's: {error}")

    def _ignored(self, why: str) -> Times:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"fastpeft: the cache of kernel choices, {self._path()}, {why}; it is ignored",
                RuntimeWarning,
                stacklevel=2,
            )
        return {}

    def _path(self) -> Path:
        return cache_folder() / f"choices-{version_key()}.json"


def cache_folder() -> Path:
    """Return the folder that the environment asks for, whether or not it exists."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    # Not Path.home(), which raises where there is none.
    return Path(os.path.expanduser("~/.cache/fastpeft"))


@cache
def version_key() -> str:
    """Return 16 hex digits of the versions and the kernels' sources."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    digest = hashlib.sha256(f"{__version__} {torch.__version__} {triton}".encode())
    spec = find_spec("fastpeft_kernels")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for source in sorted(Path(folder).rglob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _entries_of(contents: Any) -> Times:
    """Return a file's entries.

    Raises:
        ValueError: the file is another version's or has other contents.
    """
    if not isinstance(contents, dict) or contents.get("version") != version_key():
        raise ValueError("expected a dict of this version")
    entries = contents.get("entries")
    if not isinstance(entries, dict):
        raise ValueError("expected a dict of entries")
    for entry, times in entries.items():
        if not isinstance(times, dict) or not times:
            raise ValueError(f"expected times by candidate for {entry!r}")
        for name, value in times.items():
            if type(value) not in (int, float) or not 0.0 < value < math.inf:
                raise ValueError(f"expected a positive time for {entry!r}, {name!r}, got {value!r}")
    return entries
