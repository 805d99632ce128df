"""RTX 50, RTX PRO 6000: 99 KiB of shared memory a block; mma.sync, neither wgmma nor tcgen05, as sm_86."""

from __future__ import annotations

from ..kernel_names import ROW_NORM, STACKED_GRAD
from ..tile import Table, down, grad
from . import sm_86

TABLE: Table = {
    **sm_86.TABLE,
    # A stage less than sm_80's first row, and half the steps of its second: at r = 64 the assembler for
    # sm_120 spills 20 and 28 bytes of those.
    ROW_NORM: (down(32, 64, 64, 8, 2), down(16, 32, 64, 4, 3), sm_86.TABLE[ROW_NORM][2]),
    # Half the tokens of sm_80's second row, which spills 12 bytes with three projections and dropout.
    STACKED_GRAD: (sm_86.TABLE[STACKED_GRAD][0], grad(32, 64, 32, 4, 3)),
}
