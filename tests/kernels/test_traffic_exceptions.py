"""Where a pass moves or launches more than its target: counted, so no promise is wider than the truth."""

from __future__ import annotations

import pytest

from bench import traffic
from bench.block_traffic import blocks
from bench.layer_traffic import Layer
from bench.peers import TARGETS
from bench.single import Shape
from fastpeft_kernels import configs

# Counted in the interpreter: nothing here runs on a GPU.
pytestmark = pytest.mark.interpreted

SHAPE = Shape(M=256, K=160, N=384)
X, W, Y = 2 * SHAPE.M * SHAPE.K, 2 * SHAPE.N * SHAPE.K, 2 * SHAPE.M * SHAPE.N

BEYOND = {"lora backward": (1, Y), "dora backward": (1, Y), "dora forward": (1, 0)}
"""Launches and bytes above the target, where the rank is above its tiles."""


def counts(layer: Layer) -> dict[str, tuple[int, int]]:
    """Launches and bytes of full-size tensors of each pass, which must not be above the limit."""
    found = {}
    for row in traffic.measure(layer, layer.table):
        assert list(traffic.problems(layer, row)) == []
        launches, wide = row["launches"], row["compulsory_wide"]
        assert isinstance(launches, list)
        assert isinstance(wide, int)
        found[f"{row['method']} {row['pass']}"] = (len(launches), wide)
    return found


def at_target() -> dict[str, tuple[int, int]]:
    return {
        f"{method} {name}": (target.launches or 0, int(target.bytes(SHAPE.M, SHAPE.N, SHAPE.K)))
        for (method, name), target in TARGETS.items()
    }


@pytest.mark.parametrize("table", ["sm_80", "sm_86", "sm_90", "sm_100"])
@pytest.mark.parametrize("rank", [16, 32, 64])
def test_the_targets_hold_up_to_rank_64(rank: int, table: str) -> None:
    assert counts(Layer(shape=SHAPE, rank=rank, dropout=0.0, table=table)) == at_target()


@pytest.mark.parametrize("table", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("rank", [65, 128, 512])
def test_above_it_dy_is_read_twice(rank: int, table: str) -> None:
    """Backward: 4 launches, LoRA 3Y+W+2X, DoRA 4Y+W+2X; DoRA's norm two launches and one read of W."""
    expected = {
        key: (count + BEYOND.get(key, (0, 0))[0], size + BEYOND.get(key, (0, 0))[1])
        for key, (count, size) in at_target().items()
    }
    assert counts(Layer(shape=SHAPE, rank=rank, dropout=0.0, table=table)) == expected
    assert expected["lora backward"] == (4, 3 * Y + W + 2 * X)
    assert expected["dora backward"] == (4, 4 * Y + W + 2 * X)
    assert expected["dora forward"] == (4, 2 * X + 2 * W + Y)


@pytest.mark.parametrize(("table", "lora", "dora"), [("gfx942", 32, 32), ("gfx1100", 32, 16)])
def test_amd_parts_share_a_read_up_to_fewer(table: str, lora: int, dora: int) -> None:
    for rank in (16, 32, 64):
        found = counts(Layer(shape=SHAPE, rank=rank, dropout=0.0, table=table))
        for key, last in (("lora backward", lora), ("dora backward", dora)):
            launches, wide = at_target()[key]
            more = rank > last
            assert found[key] == (launches + more, wide + more * Y), (key, rank)


def test_a_bias_costs_dora_one_output_more() -> None:
    """z is written beside y, in fp16 too: 2X+2W+2Y (2X+W+2Y with the norm kept); nothing else changes."""
    expected = at_target()
    for key in ("dora forward", "dora forward, norm cached"):
        expected[key] = (expected[key][0], expected[key][1] + Y)
    assert counts(Layer(shape=SHAPE, rank=16, dropout=0.0, bias=True)) == expected
    assert expected["dora forward"] == (3, 2 * X + 2 * W + 2 * Y)


@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize("index", range(3), ids=["qkv", "grouped", "mlp"])
def test_blocks_take_it_linear_by_linear(index: int, rank: int) -> None:
    sizes = {"tokens": 256, "features": 160, "out": 400, "kv": 96, "d_ff": 448}
    block = blocks(**sizes, rank=rank, dropout=0.0)[index]
    for row in traffic.measure(block, "sm_90"):
        target = block.target(str(row["method"]), str(row["pass"]))
        assert row["compulsory_wide"] == block.moved(target), row["pass"]
        launches = row["launches"]
        assert isinstance(launches, list)
        assert len(launches) == target.launches, row["pass"]


def test_the_ranks_are_those_of_the_tables() -> None:
    """What kernels/README.md says of each part."""
    for table in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"):
        for key in (configs.GRAD_S_B, configs.GRAD_S_B_DORA):
            assert configs.TABLES[table][key][-1].block_r == 64, (table, key)
