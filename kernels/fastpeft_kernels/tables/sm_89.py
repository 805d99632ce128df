"""RTX 40, L4, L40: 99 KiB of shared memory a block, mma.sync, as sm_86."""

from __future__ import annotations

from ..tile import Table
from . import sm_86

TABLE: Table = {**sm_86.TABLE}
