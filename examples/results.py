"""What a long comparison knows so far, kept in a file: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import InputError


class Results:
    """What is known so far, kept in a file.

    Args:
        path: of the file, read if it is there.
        settings: that everything in it belongs to.

    Raises:
        InputError: the file is there and has other settings, or cannot be read.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.found: dict[str, Any] = {"settings": settings}
        if path.is_file():
            earlier = load(path)
            if earlier.get("settings") != settings:
                raise InputError(
                    f"{path}: made with other settings, {earlier.get('settings')}; give another --out"
                )
            self.found = earlier

    def get(self, *keys: str, make: Callable[[], Any]) -> Any:
        """What is under these keys, made and written down if it is not there yet."""
        place = self._place(keys)
        if keys[-1] not in place:
            made = make()
            self._place(keys)[keys[-1]] = made
            self._write()
        return self._place(keys)[keys[-1]]

    def put(self, *keys: str, value: Any) -> None:
        """Write something down, in the place of what is there."""
        self._place(keys)[keys[-1]] = value
        self._write()

    def _place(self, keys: tuple[str, ...]) -> dict[str, Any]:
        place = self.found
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        return place

    def _write(self) -> None:
        # Whole or not at all: an interrupt while it is written must not lose an hour's work.
        temporary = self._path.with_name(f".{self._path.name}.part")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)


def load(path: Path) -> dict[str, Any]:
    """Return what a results file holds; InputError if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read it as results: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object of results, got {type(found).__name__}")
    return found
