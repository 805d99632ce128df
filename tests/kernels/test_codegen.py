"""The code-generation check itself, on a telling subset; `python -m bench codegen` does all of it.

sm_90 in the quick selection: every kernel, both GEMM directions, with and without dropout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import codegen

ROOT = Path(__file__).parents[2]

PLANT = """
import sys
from bench import codegen
from fastpeft_kernels import configs
if __name__ == "__main__":
    row = configs.KernelConfig({row}, block_r=64, num_warps=4)
    configs.TABLES["sm_90"][configs.{kernel}] = (row,)
    codegen.cases = lambda quick: [codegen.Case()]
    sys.exit(codegen.main(["--target", "sm_90", "--quick", "--kernel", "{module}"]))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Python at the root, with kernels that can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_quick_selection_is_clean() -> None:
    done = run("-m", "bench.codegen", "--target", "sm_90", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout
    assert "HGMMA" in done.stdout


@pytest.mark.parametrize(
    ("module", "kernel", "row", "fault"),
    [
        ("rank_r_gemm", "RANK_R_GEMM", "block_m=128, block_n=256, block_k=64, num_stages=3", "spills"),
        ("grad_a", "GRAD_A", "block_m=64, block_n=128, num_stages=20", "shared memory"),
    ],
    ids=["spill", "shared-memory"],
)
def test_planted_fault_is_found(module: str, kernel: str, row: str, fault: str, tmp_path: Path) -> None:
    """A 128x256 accumulator over 4 warps cannot stay in registers; 20 stages cannot stay in 227 KiB."""
    script = tmp_path / "plant.py"
    script.write_text(PLANT.format(module=module, kernel=kernel, row=row))
    done = run(str(script))
    assert done.returncode == 1, done.stdout + done.stderr
    assert fault in done.stdout


def test_what_counts_as_a_fault() -> None:
    item = codegen.Launch(
        target="sm_90",
        module="rank_r_gemm",
        kernel="",
        note="",
        tensor_cores=True,
        signature=(),
        constants=(),
        attributes=(),
        options=(("num_warps", 4),),
    )
    good = {"registers": 255, "shared": 232448, "tensor_core": {"HGMMA": 1}}
    assert codegen.faults(item, codegen.Measured(**good)) == []
    for bad in (
        {"spill_stores": 4},
        {"spill_loads": 4},
        {"stack": 8},
        {"shared": 232449},
        {"tensor_memory": 513},
        {"tensor_core": {}},
        {"error": "ptxas failed"},
    ):
        assert codegen.faults(item, codegen.Measured(**(good | bad))), bad
