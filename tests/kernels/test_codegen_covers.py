"""What the code-generation check leaves out, and what it reads of a stream that is not in the main loop."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import pytest

from bench.codegen.families import FAMILIES
from bench.codegen.family import Kernel
from bench.codegen.machine_code import Mix, faults
from bench.codegen.main import heaviest
from bench.codegen.specialised import Launch
from tests.kernels.test_codegen import GOOD, launch, run, specialised, with_arguments


def chosen(target: str, family: str, kernel: str) -> tuple[list[Launch], list[Launch]]:
    """Every launch of a kernel and what is compiled of it, from a process whose kernels can be compiled."""
    done = run("-c", CHOSEN, target, family, kernel)
    assert done.returncode == 0, done.stderr
    return pickle.loads(bytes.fromhex(done.stdout))  # type: ignore[no-any-return]


CHOSEN = """
import pickle, sys
from bench.codegen.families import FAMILIES
from bench.codegen.main import distinct, heaviest
from bench.codegen.recording import record
target, name, kernel = sys.argv[1:]
family = next(entry for entry in FAMILIES if entry.name == name)
launches = [item for item in record(target, family, quick=False).launches if item.kernel.name == kernel]
print(pickle.dumps((launches, heaviest(distinct(launches)))).hex())
"""


def test_more_unrolled_tiles_of_the_rank_are_more_code() -> None:
    four, one = (with_arguments(BLOCK_M=64, BLOCK_R=128, R_TILES=tiles) for tiles in (4, 1))
    assert four.covers(one)
    assert not one.covers(four)
    wider = with_arguments(BLOCK_M=64, BLOCK_R=256, R_TILES=1)
    assert not wider.covers(four)
    assert heaviest([one, four]) == [four]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_four_unrolled_tiles_are_compiled(target: str) -> None:
    """r = 512 with tiles of 128, forward and dx; z only where warps are not specialised."""
    _, compiled = chosen(target, "tma", "rank_r_gemm_tma")
    constants = [item.named_constants() for item in compiled]
    unrolled = [found for found in constants if found["R_TILES"] == 4]
    assert {found["Q_BY_COLUMNS"] for found in unrolled} == {False, True}
    assert all(found["BLOCK_R"] == 128 for found in unrolled)


@pytest.mark.parametrize("target", ["sm_86", "sm_90", "gfx1100"])
def test_the_single_kernel_is_compiled_at_every_rank(target: str) -> None:
    """In bf16, each aligned tile at r = 16, 32 and 64."""
    every, compiled = chosen(target, "small", "single")
    launches = [item for item in every if item.aligned and item.dtype == "bf16"]
    wanted = {item.tile() for item in launches}
    assert {item.rank_tile() for item in launches} == {16, 32, 64}
    assert wanted <= {item.tile() for item in compiled}
    # Still left out: what a heavier one of the same tile covers.
    assert Counter(item.tile() for item in compiled)[launches[0].tile()] < len(launches)


def test_a_rank_tile_that_stands_for_itself_alone() -> None:
    kernel = replace(launch().kernel, each_rank_tile=True)
    wide, narrow = (specialised(block_r, "*bf16", kernel=kernel) for block_r in (32, 16))
    assert not wide.covers(narrow)
    assert wide.covers(specialised(32, None, kernel=kernel))
    odd, fp32 = ({"aligned": False}, {"dtype": "fp32"})
    for other in (odd, fp32):
        assert replace(wide, **other).covers(replace(narrow, **other))  # type: ignore[arg-type]


def test_a_tile_that_is_read_once_must_be_read_by_wide_loads() -> None:
    """64 x 64 of 16 bits over 4 warps of 32: four loads of 16 bytes, and those in the loop do not count."""
    kernel = Kernel(module="expand", function="expand_kernel", streams=False, reads_tile=True)
    item = with_arguments(BLOCK_M=64, BLOCK_N=64, BLOCK_R=16)
    item = replace(item, kernel=kernel)
    assert item.stream_loads() == 4
    loop = Mix(total=5, tensor_core=1, wide_loads=2)
    measured = replace(GOOD, loop=loop, whole=Mix(total=20, tensor_core=1, wide_loads=6))
    assert faults(item, measured) == []
    narrow = replace(measured, whole=Mix(total=20, tensor_core=1, wide_loads=5, other_loads=4))
    assert faults(item, narrow)
    assert faults(replace(item, aligned=False), narrow) == []


def test_y_is_such_a_tile() -> None:
    expand = {kernel.name: kernel for entry in FAMILIES for kernel in entry.kernels}["expand"]
    assert expand.reads_tile
