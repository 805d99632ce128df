"""``python -m fastpeft COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: python -m fastpeft COMMAND [options]

commands:
  plan MODEL    what a training step will hold in memory, and what fits

Options of a command: python -m fastpeft COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 if there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] != "plan":
        print(f"python -m fastpeft: unknown command {words[0]!r}, expected: plan", file=sys.stderr)
        return 2
    from fastpeft.planning.cli import main as plan_main

    return plan_main(words[1:])


if __name__ == "__main__":
    raise SystemExit(main())
