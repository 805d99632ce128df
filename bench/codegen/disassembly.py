"""SASS of cubins, many in one go: the disassembler needs 0.3 s to start, and next to nothing for a kernel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ADDRESS = re.compile(r"/\*([0-9a-f]{4,})\*/")


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """SASS of each cubin after its resource usage (``REG:40 STACK:0 ...``).

    Their code is laid end to end and disassembled as one image; addresses, those of branches too, are places
    in it.

    Args:
        cubins: ELF images for one architecture.
        arch: its number, 80 to 120.
    """
    from triton import knobs

    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image")
        image.write_bytes(b"".join(codes))
        family = f"SM{arch}{'a' if arch >= 90 else ''}"  # Triton compiles for what one part alone has
        lines = _run(knobs.nvidia.nvdisasm.path, "-b", family, "-ndf", str(image)).splitlines()
        usages = []
        for cubin in cubins:
            image.write_bytes(cubin)
            usages.append(_run(knobs.nvidia.cuobjdump.path, "-res-usage", str(image)))
    found, end = [], 0
    instructions = [(int(match[1], 16), line) for line in lines if (match := ADDRESS.search(line))]
    for usage, code in zip(usages, codes, strict=True):
        start, end = end, end + len(code)
        found.append("\n".join([usage, *(line for address, line in instructions if start <= address < end)]))
    return found


def machine_code(cubin: bytes) -> bytes:
    """The sections of an ELF file of 64 bits that hold instructions, one after the other."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    names = sections[names_index][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text", names + name)
    )


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
