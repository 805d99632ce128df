"""Two folders change places in one step, where the kernel can: readers find all of the one or of the other.

Linux: ``renameat2(..., RENAME_EXCHANGE)``, on the local file systems and not on network ones.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

_AT_FDCWD = -100  # relative paths are the process's
_RENAME_EXCHANGE = 2


def put_in_place(new: Path, folder: Path, names: Collection[str], beside: str) -> bool:
    """Make the files of ``new``, a folder inside, the folder's, in one step; its other files stay.

    Args:
        new: holds files of these names, flushed; is gone afterwards.
        folder: whose files they replace. It becomes another folder with the same name, owner, mode and files.
        names: which files are replaced.
        beside: how the name begins that ``new`` has for a moment, next to the folder; a kill may leave it.

    Returns:
        False, with everything as it was, where that cannot be: another system or file system, a mount point,
        the working folder, one that holds folders or links, or whose parent cannot be written to.
    """
    exchange, folder = _exchange(), folder.resolve()
    if exchange is None or folder == Path.cwd():
        return False
    others = [entry for entry in folder.iterdir() if entry.name not in names and entry != folder / new.name]
    if any(entry.is_symlink() or not entry.is_file() for entry in others):
        return False
    aside = folder.parent / f"{beside}{secrets.token_hex(8)}"
    try:
        new.rename(aside)
    except OSError:
        return False
    try:
        for entry in others:
            os.link(entry, aside / entry.name)
        shutil.copystat(folder, aside)
        is_exchanged = _owner(aside) == _owner(folder) and exchange(aside, folder)
    except OSError:
        is_exchanged = False
    if not is_exchanged:
        aside.rename(new)
        return False
    for entry in aside.iterdir():  # what somebody wrote meanwhile
        kept = folder / entry.name
        if entry.name not in names and not (kept.exists() and kept.samefile(entry)):
            entry.replace(kept)
    shutil.rmtree(aside, ignore_errors=True)
    return True


def _owner(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid


def _exchange() -> Callable[[Path, Path], bool] | None:
    """Return what exchanges two paths and says whether it could, or None where there is no such call."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux; TypeError: Windows
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)

    def exchange(a: Path, b: Path) -> bool:
        done: int = call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
        return done == 0

    return exchange
