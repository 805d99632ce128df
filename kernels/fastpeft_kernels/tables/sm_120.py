"""RTX 50, RTX PRO 6000: 99 KiB of shared memory a block; mma.sync, neither wgmma nor tcgen05, as sm_86."""

from __future__ import annotations

from ..tile import Table
from . import sm_86

TABLE: Table = {**sm_86.TABLE}
