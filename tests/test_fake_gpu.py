"""The check without a GPU that kernel tests keep their tensors on one: that it finds what it should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PLANT = """
import pytest
import torch

from bench.launch_traffic import counted
from fastpeft_kernels import lora_forward, rank_r_gemm_tma
from tests.device import DEVICE
from tests.kernels.reference import make_problem, run_lora


def test_right(device):
    run_lora(make_problem(5, 6, 7, 2, torch.float32, device))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=generator).to(DEVICE)
    assert torch.equal(x + torch.ones_like(x), x + torch.ones(3, 4, device=DEVICE))
    assert torch.equal(torch.randn(3) * 0.0, torch.zeros(3))  # all of them on the CPU


def test_kernel_on_the_cpu(device):
    p = make_problem(5, 6, 7, 2, torch.float32, device)
    lora_forward(torch.ones(5, 6), p.weight, None, p.lora_A, p.lora_B, 1.0)


def test_computed_from_the_cpu(device):
    p = make_problem(5, 6, 7, 2, torch.float32, device)
    lora_forward((torch.ones(6, 5) * 2).t(), p.weight, None, p.lora_A, p.lora_B, 1.0)


def test_mixed():
    torch.ones(3, device=DEVICE) + torch.ones(3)


def test_compared():
    assert torch.equal(torch.ones(3, device=DEVICE), torch.ones(3))


def test_cpu_generator():
    torch.randn(3, generator=torch.Generator(), device=DEVICE)


def test_counted():
    with counted("sm_90", units=4):
        x, w, a, b = (torch.empty(64, 64, device=DEVICE) for _ in range(4))
        lora_forward(x, w, None, a, b, 1.0)


@pytest.mark.interpreted
def test_marked():
    raise AssertionError("runs")
"""
WRONG = ("kernel_on_the_cpu", "computed_from_the_cpu", "mixed", "compared", "cpu_generator", "counted")
# Where kernels are launched through the ops, and below them, in a few seconds.
QUICK = ["tests/ops/test_kernel_paths.py", "tests/kernels/test_launch.py"]


def run(*words: str) -> str:
    environment = os.environ | {"FASTPEFT_TEST_FAKE_GPU": "1", "TRITON_INTERPRET": "1", "COLUMNS": "250"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    ).stdout


def test_planted_mistakes_are_found(tmp_path: Path) -> None:
    """In a folder called kernels, with this one's set-up."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "test_planted.py").write_text(PLANT)
    plugins = ["-p", "tests.conftest", "-p", "tests.kernels.conftest"]
    said = run(*plugins, "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(folder))
    for name in WRONG:
        (line,) = (line for line in said.splitlines() if "FAILED" in line and f"::test_{name} " in line)
        assert "WrongDeviceError" in line, said
    assert f"{len(WRONG)} failed, 1 passed, 1 skipped" in said, said


@pytest.mark.parametrize("file", QUICK)
def test_tensors_are_on_the_device(file: str) -> None:
    said = run(file)
    assert " passed" in said, said
    assert " failed" not in said, said
    assert " error" not in said, said


def test_what_counts_launches_is_marked() -> None:
    """On a GPU nothing is interpreted, so nothing is counted: such a test would fail there."""
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")):
        text = path.read_text()
        if "launch_traffic" in text or "bench import traffic" in text:
            assert "pytest.mark.interpreted" in text, path.name
