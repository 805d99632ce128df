"""What ends an example early, and how it is told: in one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

import fastpeft


class InputError(Exception):
    """Something the user gave, or has to install, is missing or wrong."""


def exit_code(program: str, job: Callable[[], int], *, goes_on: bool = False) -> int:
    """Run ``job`` and return its exit code: 2 after wrong input, 130 after an interruption.

    ``goes_on``: the same command would go on from there.
    """
    try:
        return job()
    except (InputError, fastpeft.FastPeftError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        more = "; the same command goes on from here" if goes_on else ""
        print(f"{program}: interrupted{more}", file=sys.stderr)
        return 130
