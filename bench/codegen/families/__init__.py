"""The registry of kernel families: one file each, listed here.

To add one, write `families/NAME.py` with a `FAMILY` and add its module to the tuple below. The classes are in
`bench/codegen/family.py`. The file

- names every kernel the family brings (`Kernel`: where it is, whether 16-bit launches must have tensor-core
  instructions, whether those must be wgmma and tcgen05, whether its loads must be 16 bytes wide);
- names the keys of the configuration tables of which every row must be reached by its cases, on each target,
  in the target's own table, in `fp32` and in `unaligned`;
- yields `Case`s: closures that call the package's own launchers on meta tensors (`meta(...)`). Import the
  launchers in the function that makes the cases, so that the registry itself loads no kernel. While a case
  runs, every `triton.jit` function of `fastpeft_kernels` is replaced by a recorder, `configs.architecture`
  names the target and `launch.unit_count` says 132, so a launcher takes the path and the row it would take
  there. Launch a kernel with `kernel[grid](...)`; read a row only through `configs.rows` (or `select*`, which
  do), for that is how the check knows which rows were launched (a row counts when its `num_warps` is read).

Mark as `default` the cases that CI compiles (`--quick`): at least one launch of every kernel, and of every
key at least one row; main.py counts a kernel or key without one as a fault. Equal launches are compiled
once, so cases may overlap. Keep to what differs in machine code: about 1 CPU second a launch, times eight
targets; 12 default and 60 launches in all a target and family keep the matrix below its time limit.
"""

from __future__ import annotations

from ..family import Family
from . import blocks, dora, lora, small, tma

FAMILIES: tuple[Family, ...] = (lora.FAMILY, tma.FAMILY, dora.FAMILY, small.FAMILY, blocks.FAMILY)
