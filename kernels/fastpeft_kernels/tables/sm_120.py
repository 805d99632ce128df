"""RTX 50, RTX PRO 6000: 99 KiB of shared memory a block; mma.sync, neither wgmma nor tcgen05, as sm_86."""

from __future__ import annotations

from ..kernel_names import ROW_NORM
from ..tile import Table, down
from . import sm_86

TABLE: Table = {
    **sm_86.TABLE,
    # A stage less than sm_80's first row: at r = 64 the assembler for sm_120 spills 20 bytes of that one.
    ROW_NORM: (down(32, 64, 64, 8, 2), *sm_86.TABLE[ROW_NORM][1:]),
}
