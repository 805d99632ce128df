"""The code-generation check itself, on a telling subset; `python -m bench codegen` does all of it.

sm_90 in the quick selection of one family: every kernel of it, both GEMM directions, with and without
dropout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from bench.codegen import machine_code, main, recording
from bench.codegen.families import FAMILIES
from bench.codegen.family import Case, Kernel, meta
from bench.codegen.loops import Step, natural_loops
from bench.codegen.machine_code import Measured, Mix, faults
from bench.codegen.main import distinct, heaviest
from bench.codegen.specialised import Launch, specialise
from bench.codegen.targets import TARGETS
from fastpeft_kernels import configs

ROOT = Path(__file__).parents[2]

PLANT = """
import sys
from dataclasses import replace
from bench.codegen import main
from bench.codegen.families import lora
from fastpeft_kernels import configs
if __name__ == "__main__":
    row = configs.KernelConfig({row}, block_r=64, num_warps=4)
    configs.TABLES["sm_90"]["{key}"] = (row,)
    family = replace(lora.FAMILY, cases=lambda target: lora.layer_cases(lora.Layer(default=True)))
    main.FAMILIES = (family,)
    sys.exit(main.main(["--target", "sm_90", "--quick", "--family", "lora", "--kernel", "{key}"]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Python at the root, with kernels that can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_quick_selection_is_clean() -> None:
    done = run("-m", "bench.codegen", "--target", "sm_90", "--quick", "--family", "lora")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout
    assert "HGMMA" in done.stdout


@pytest.mark.parametrize(
    ("key", "row", "fault"),
    [
        ("rank_r_gemm", "block_m=128, block_n=256, block_k=64, num_stages=3", "spills"),
        ("grad_a", "block_m=64, block_n=128, num_stages=20", "shared memory"),
    ],
    ids=["spill", "shared-memory"],
)
def test_planted_fault_is_found(key: str, row: str, fault: str, tmp_path: Path) -> None:
    """A 128x256 accumulator over 4 warps cannot stay in registers; 20 stages cannot stay in 227 KiB."""
    script = tmp_path / "plant.py"
    script.write_text(PLANT.format(key=key, row=row))
    done = run(str(script))
    assert done.returncode == 1, done.stdout + done.stderr
    assert fault in done.stdout


TWO_OF_ONE_TARGET = """
from bench.codegen.families import lora
from bench.codegen.machine_code import compile_launches
from bench.codegen.recording import record
launches = record("sm_80", lora.FAMILY, quick=True).launches[:2]
together = compile_launches(launches)
assert together == [compile_launches([item])[0] for item in launches], together
for item in together:
    assert item.registers and item.loop.tensor_core and item.whole.total > item.loop.total, item
"""


def test_kernels_disassembled_in_one_go_are_told_apart() -> None:
    done = run("-c", TWO_OF_ONE_TARGET)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_compiler_that_dies_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [launch(note=str(index)) for index in range(3)]

    class Worker:
        def __init__(self, stack: object) -> None:
            pass

        def submit(self, batch: list[Launch]) -> Future[list[Measured]]:
            done: Future[list[Measured]] = Future()
            if items[1] in batch:
                done.set_exception(BrokenProcessPool())
            else:
                done.set_result([GOOD] * len(batch))
            return done

    monkeypatch.setattr(main, "Worker", Worker)
    found = dict(main.compile_all(items, workers=2))
    assert [found[item].error for item in items] == ["", "the compiler process died", ""]


def launch(target: str = "sm_90", **changes: object) -> Launch:
    item = Launch(
        target=target,
        kernel=Kernel(module="rank_r_gemm", function="rank_r_gemm_kernel", gemm=True),
        note="",
        dtype="bf16",
        aligned=True,
        signature=(),
        constants=(),
        attributes=(),
        options=(("num_warps", 4),),
    )
    return replace(item, **changes)  # type: ignore[arg-type]


GOOD = Measured(registers=255, shared=232448, tensor_core={"HGMMA": 1}, loop=Mix(total=9, wide_loads=1))


def test_what_counts_as_a_fault() -> None:
    assert faults(launch(), GOOD) == []
    for bad in (
        {"spill_stores": 4},
        {"spill_loads": 4},
        {"stack": 8},
        {"shared": 232449},
        {"tensor_memory": 513},
        {"tensor_core": {}},
        {"tensor_core": {"HMMA": 1}},
        {"loop": Mix(total=9, other_loads=1)},
        {"loop": Mix(total=9, wide_loads=1, other_loads=3)},
        {"error": "ptxas failed"},
    ):
        assert faults(launch(), replace(GOOD, **bad)), bad


def test_what_does_not_count_as_a_fault() -> None:
    narrow = replace(GOOD, loop=Mix(total=9, other_loads=1))
    assert faults(launch(aligned=False), narrow) == []
    assert faults(launch(kernel=replace(launch().kernel, streams=False)), narrow) == []
    assert faults(launch(dtype="fp32"), replace(narrow, tensor_core={})) == []
    assert faults(launch("sm_80"), replace(GOOD, shared=0, tensor_core={"HMMA": 1})) == []
    specialised = replace(GOOD, loop=Mix(total=9, tensor_core=4), whole=Mix(total=99, wide_loads=2))
    assert faults(launch(), specialised) == [], "another warp loads"
    small = replace(launch().kernel, gemm=False)
    assert faults(launch(kernel=small), replace(GOOD, tensor_core={"HMMA": 1})) == []
    assert faults(launch("sm_100"), GOOD)


def test_families_claim_every_key_and_name_no_kernel_twice() -> None:
    assert recording.unclaimed() == []
    names = [kernel.name for family in FAMILIES for kernel in family.kernels]
    assert len(names) == len(set(names))
    assert set(TARGETS) | {"fp32", "unaligned", "interpreter"} == set(configs.TABLES)


def test_rows_count_as_reached_when_their_warps_are_read() -> None:
    found = recording.Recorded()
    rows = recording.watched_tables(("sm_90",), found)["sm_90"]["grad_a"]
    assert rows[1].r_tile(8) == 16
    assert rows[1].block_m
    assert not found.rows
    assert rows[1].num_warps == configs.TABLES["sm_90"]["grad_a"][1].num_warps
    assert found.rows == found.pending == {("sm_90", "grad_a", 1)}


def test_a_loop_is_not_every_jump_backwards() -> None:
    """3 jumps back to 1: a loop. 6 lies behind the end, spins on itself and jumps back into the loop."""
    steps = [
        Step("setup"),
        Step("head"),
        Step("wait", jump=6),
        Step("mma", jump=1),
        Step("store"),
        Step("EXIT", falls_through=False),
        Step("TRYWAIT", jump=6),
        Step("BRA", jump=3, falls_through=False),
    ]
    loops = {frozenset(steps[place].name for place in body) for body in natural_loops(steps)}
    assert loops == {frozenset({"TRYWAIT"}), frozenset({"head", "wait", "mma", "TRYWAIT", "BRA"})}


SASS = """
 REG:40 STACK:0 SHARED:0
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P5 ;
        /*0020*/                   LDGDEPBAR ;
        /*0030*/             @!PT LDS RZ, [RZ] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/              @P0 BRA 0x10 ;
        /*0060*/                   STL.64 [R1], R2 ;
        /*0070*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0080*/                   LDS.128 R2, [R2] ;
        /*0090*/                   EXIT ;
"""

AMDGCN = """
	s_load_b64 s[0:1], s[0:1], 0x0
.LBB0_1:
	buffer_load_b128 v[0:3], v4, s[0:3], 0 offen
	buffer_load_u16 v5, v4, s[0:3], 0 offen
	ds_load_b128 v[0:3], v4
	v_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
	.section .rodata
    .vgpr_count:     24
    .vgpr_spill_count: 2
"""


def test_reading_machine_code() -> None:
    measured = Measured()
    machine_code.read_sass(SASS, measured)
    assert (measured.registers, measured.spill_stores, measured.tensor_core) == (40, 8, {"HMMA": 1})
    assert measured.loop == Mix(total=4, tensor_core=1, wide_loads=1)
    assert measured.whole == Mix(total=9, tensor_core=1, wide_loads=1, other_loads=1, shared_loads=1)
    measured = Measured()
    machine_code.read_amdgcn(AMDGCN, measured)
    assert (measured.registers, measured.spill_stores, measured.tensor_core) == (24, 8, {"v_wmma": 1})
    assert measured.loop == Mix(total=5, tensor_core=1, wide_loads=1, other_loads=1, shared_loads=1)


def specialised(
    block_r: int, bias: str | None, adapter: str = "*fp32", branch: bool = True, **changes: object
) -> Launch:
    """A launch with a wide operand, an adapter, perhaps a bias, a flag and two tiles."""
    kinds = ("*bf16", adapter, bias or "constexpr", "constexpr", "constexpr", "constexpr")
    names = ("p_x", "p_r", "p_bias", "HAS_DROPOUT", "BLOCK_M", "BLOCK_R")
    constants: list[tuple[tuple[int, ...], object]] = [((3,), branch), ((4,), 64), ((5,), block_r)]
    constants += [((2,), None)] if bias is None else []
    return launch(signature=tuple(zip(names, kinds, strict=True)), constants=tuple(constants), **changes)


def test_what_a_launch_covers() -> None:
    full = specialised(32, "*bf16")
    for less in (
        specialised(16, "*bf16"),
        specialised(32, None),
        specialised(32, "*bf16", branch=False),
        specialised(32, "*bf16", adapter="*fp16", dtype="fp16"),
        specialised(32, "*bf16", adapter="*bf16"),
    ):
        assert full.covers(less)
        assert not less.covers(full) or less.dtype == "fp16"
        assert heaviest([less, full]) == heaviest([full, less]) == [full]
    assert not full.covers(specialised(64, None)), "a wider tile"
    assert not full.covers(specialised(32, "*fp32", dtype="fp32")), "another type"
    other = specialised(16, None, options=(("num_warps", 8),))
    assert heaviest([full, other]) == [full, other], "other warps"


def with_arguments(**values: object) -> Launch:
    """A launch as it is recorded, of a kernel whose compile-time arguments are in capitals."""

    @dataclass
    class Parameter:
        name: str
        is_constexpr: bool
        do_not_specialize: bool = False

    params = [Parameter(name, name.isupper()) for name in values]
    case = Case(run=lambda: None, note="", dtype=torch.bfloat16)
    return specialise("sm_90", case, launch().kernel, params, values, {"num_warps": 4})


def test_what_is_not_there_has_no_stride() -> None:
    """An operand's stride is 1, or a number; where there is no operand it is 0, and of no account."""
    vector = meta(8, dtype=torch.bfloat16)
    full, absent = with_arguments(p_m=vector, stride_m=1), with_arguments(p_m=None, stride_m=0)
    assert full.covers(absent)
    assert not absent.covers(full)
    assert not full.covers(with_arguments(p_m=vector, stride_m=2))
    assert heaviest([absent, full]) == [full]


def test_three_projections_stand_for_two_and_for_one_without_an_adapter() -> None:
    a = meta(16, 64, dtype=torch.bfloat16)
    three = with_arguments(p_a=(a, a, a), p_seed=(a, a, a), COUNT=3)
    for less in (
        with_arguments(p_a=(a, a), p_seed=(a, a), COUNT=2),
        with_arguments(p_a=(a, None, a), p_seed=None, COUNT=3),
    ):
        assert three.covers(less)
        assert not less.covers(three)


def test_a_rank_that_fills_its_tile_does_not_stand_for_one_that_does_not() -> None:
    ragged, full = (with_arguments(R=r, BLOCK_M=64, BLOCK_R=16) for r in (5, 16))
    assert ragged.covers(full)
    assert not full.covers(ragged)
    assert not with_arguments(R=64, BLOCK_M=64, BLOCK_R=64).covers(ragged)


def test_every_row_is_compiled_with_its_own_widest_tile() -> None:
    """Two rows of one tile but for the rank's: the wider one covers the other's launches, and yet."""
    wide, narrow, narrower = (
        replace(specialised(block_r, bias), rows=frozenset({("sm_90", "grad_a", row)}))
        for block_r, bias, row in ((64, "*bf16", 1), (32, "*bf16", 0), (16, None, 0))
    )
    assert wide.covers(narrow)
    assert wide.covers(narrower)
    assert heaviest([narrower, narrow, wide]) == [narrow, wide]
    assert heaviest([replace(narrower, rows=frozenset()), wide]) == [wide]
    # Equal launches of two rows are one, which answers for both.
    both = distinct([narrow, replace(narrow, rows=wide.rows)])
    assert [item.rows for item in both] == [narrow.rows | wide.rows]


def test_the_matrix_stays_small() -> None:
    """sm_90 has most; all eight have 1,067, which is within 15 minutes on two cores."""
    done = run("-m", "bench.codegen", "--list", "--target", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    count = int(last.split()[0])
    assert sum(line.startswith("sm_90") for line in lines) == count <= 143, last
    assert last.endswith("to compile, 0 faults")
