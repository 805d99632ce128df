"""What surrounds the kernels: lazy import, the choice of rows, split reductions, specialisation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft_kernels import configs, is_available, launch, lora_forward, rank_r_gemm

KERNELS = Path(__file__).parents[2] / "kernels"

WITHOUT_TRITON = """
import sys
sys.path.insert(0, {path!r})
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import fastpeft_kernels
assert "triton" not in sys.modules
assert not fastpeft_kernels.is_available()
for name in ("lora_forward", "lora_backward", "dora_forward", "dora_backward", "row_norm"):
    try:
        getattr(fastpeft_kernels, name)
    except ImportError as error:
        assert "pip install fastpeft[triton]" in str(error)
    else:
        raise AssertionError("expected ImportError")
"""


def test_imports_without_triton() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON.format(path=str(KERNELS))], check=True)
    assert is_available()


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")


@pytest.mark.usefixtures("sm_90")
@pytest.mark.parametrize(
    ("m", "n", "blocks"),
    [(8192, 4096, (128, 256)), (1024, 4096, (128, 128)), (512, 4096, (64, 128)), (1, 4096, (64, 64))],
)
def test_gemm_takes_the_largest_tile_that_fills_the_device(m: int, n: int, blocks: tuple[int, int]) -> None:
    row = configs.select_gemm(configs.RANK_R_GEMM, tensor(m, 64), tensor(64, n), units=132)
    assert (row.block_m, row.block_n) == blocks


@pytest.mark.usefixtures("sm_90")
def test_rows_by_rank_dtype_and_alignment() -> None:
    x = tensor(64, 4096)
    for r, tile in {1: 16, 16: 16, 17: 32, 64: 64, 100: 128, 512: 128}.items():
        assert configs.select(configs.GRAD_A, x, r).r_tile(r) == tile
    table = configs.TABLES
    assert configs.rows(configs.GRAD_A, x.float()) == table["fp32"][configs.GRAD_A]
    assert configs.rows(configs.GRAD_A, tensor(64, 999)) == table["unaligned"][configs.GRAD_A]
    assert configs.rows(configs.GRAD_A, x.t()) == table["sm_90"][configs.GRAD_A]


@pytest.mark.parametrize("table", configs.TABLES)
def test_tables_are_complete(table: str) -> None:
    assert set(configs.TABLES[table]) == set(configs.KERNELS)


@pytest.mark.parametrize(
    ("programs", "tiles"), [(1, 1), (1, 100), (3, 7), (132, 64), (500, 64), (16, 128), (0, 5)]
)
def test_split_covers_every_tile_once(programs: int, tiles: int) -> None:
    splits, per_split = launch.split_reduction(programs, tiles, units=132)
    assert splits * per_split >= tiles
    assert (splits - 1) * per_split < tiles
    assert splits == 1 or programs * splits <= 132


@pytest.mark.parametrize("scaling", [1, 2, 0.0, 0.5])
def test_scaling_is_no_part_of_the_specialisation(
    scaling: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles anew for some ints (1, multiples of 16), never for a float: launchers pass floats."""
    seen: list[object] = []

    class Recorder:
        def __getitem__(self, grid: object) -> object:
            return lambda *arguments, **keywords: seen.extend(arguments[-3:])

    monkeypatch.setattr(rank_r_gemm, "rank_r_gemm_kernel", Recorder())
    x, weight, a, b = (torch.ones(*shape, device=device) for shape in ((3, 4), (5, 4), (2, 4), (5, 2)))
    lora_forward(x, weight, None, a, b, scaling)
    assert [type(value) for value in seen] == [float] * 3
