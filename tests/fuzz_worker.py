"""Loads folders within limits: `python fuzz_worker.py GOOD BYTES SECONDS`, a folder in each line of stdin.

It answers each with a line of JSON: what came of it ("loaded", "refused", or another error), and by how many
bytes the address space has been larger than at the start. Memory beyond the limit is refused to it; a folder
that takes longer ends it.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import fastpeft


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


def address_space(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def outcome(folder: str) -> str:
    try:
        fastpeft.load(base(), folder)
    except fastpeft.CheckpointError as error:
        # Memory that was refused is an error that load reports like any other.
        memory = isinstance(error.__cause__, MemoryError) or "allocat" in str(error)
        return f"memory: {error}" if memory else "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def main() -> None:
    good, limit, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    print(json.dumps([outcome(good), 0]), flush=True)  # which imports what is imported late
    start = address_space("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (start + limit, start + limit))
    for line in sys.stdin:
        signal.alarm(seconds)
        found = outcome(line.rstrip("\n"))
        signal.alarm(0)
        print(json.dumps([found, address_space("VmPeak") - start]), flush=True)


if __name__ == "__main__":
    main()
