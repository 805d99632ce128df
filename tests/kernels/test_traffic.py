"""The traffic counter counts what it says, and the limits stop a pass that moves more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench_cli
from bench import traffic
from bench.block_traffic import Block, blocks
from bench.launch_traffic import counted, distinct_bytes
from bench.layer_traffic import Layer
from bench.peers import PEERS, PUBLISHED, TARGETS
from bench.single import Shape
from fastpeft_kernels import Projection, configs, lora, rank_r_gemm_tma, stacked
from fastpeft_kernels.tile import down, gemm, grad

# The counter counts in the interpreter, tensors it never touches: nothing here runs on a GPU.
pytestmark = pytest.mark.interpreted

SHAPE = Shape(M=256, K=128, N=384)

# Tiles that divide the shape: every count can be done by hand.
ROWS = {
    configs.RANK_R_GEMM: (gemm(64, 128, 64, 16, 4, 1),),
    configs.DOWN_PROJECTION: (down(64, 64, 16, 4, 1),),
    configs.GRAD_S_B: (grad(64, 128, 16, 4, 1),),
    configs.GRAD_A: (grad(64, 64, 16, 4, 1),),
    configs.STACKED_DOWN: (down(64, 64, 16, 4, 1),),
    configs.STACKED_GEMM: (gemm(64, 128, 64, 16, 4, 1),),
}
SIZES = {"tokens": 256, "features": 128, "out": 384, "kv": 128, "d_ff": 448, "rank": 16}
QKV, GROUPED, MLP = blocks(**SIZES, dropout=0.0)


@pytest.fixture(autouse=True)
def _known_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, rows in ROWS.items():
        monkeypatch.setitem(configs.TABLES["sm_90"], key, rows)


def wide(*dims: int) -> torch.Tensor:
    return torch.empty(dims, dtype=torch.bfloat16)


def test_lora_forward_by_hand() -> None:
    m, k, n, r = SHAPE.M, SHAPE.K, SHAPE.N, 16
    with counted("sm_90", units=4) as launches:
        lora.lora_forward(wide(m, k), wide(n, k), None, wide(r, k), wide(n, r), 2.0)
    down_launch, gemm_launch = launches
    assert down_launch.kernel == "down_projection"
    assert down_launch.programs == 4
    # Four row tiles: x once, A four times; products of 2 m k r FLOPs; S [m, r] out.
    assert (down_launch.loaded, down_launch.stored) == (2 * (m * k + 4 * r * k), 2 * m * r)
    assert down_launch.flops == 2 * m * k * r
    assert down_launch.compulsory == 2 * (m * k + r * k + m * r)
    # Four by three tiles of 64x128: x and S once a column of tiles, W and B once a row of them.
    assert gemm_launch.programs == 12
    assert gemm_launch.loaded == 2 * (3 * m * k + 4 * n * k + 3 * m * r + 4 * n * r)
    assert gemm_launch.stored == 2 * m * n
    assert gemm_launch.flops == 2 * m * n * (k + r)
    assert gemm_launch.compulsory == 2 * (m * k + n * k + m * r + n * r + m * n)


def test_stacked_forward_by_hand() -> None:
    """Grouped widths, no adapter on v: every projection counts with its own tiles."""
    m, k, r = SHAPE.M, SHAPE.K, 16
    q, key, v = (Projection(weight=wide(n, k), lora_A=wide(r, k), lora_B=wide(n, r)) for n in (384, 128, 128))
    projections = [q, key, replace(v, lora_A=None, lora_B=None)]
    with counted("sm_90", units=4) as launches:
        stacked.stacked_forward(wide(m, k), projections)
    down_launch, gemm_launch = launches
    # One read of x for the A of q and of k, and one S.
    assert down_launch.loaded == 2 * (m * k + 4 * 2 * r * k)
    assert down_launch.compulsory == 2 * (m * k + 2 * r * k + m * 2 * r)
    # Four by 3 + 1 + 1 tiles of 64x128.
    assert gemm_launch.programs == 20
    assert gemm_launch.loaded == 2 * (5 * m * k + 4 * 640 * k + 4 * m * r + 4 * 512 * r)
    assert gemm_launch.stored == 2 * m * 640
    assert gemm_launch.flops == 2 * m * (640 * k + 512 * r)
    assert gemm_launch.compulsory == 2 * (m * k + 640 * k + 2 * m * r + 512 * r + m * 640)


def test_copies_by_descriptor_count_as_loads() -> None:
    m, k, n, r = 128, 128, 256, 16
    p, q = wide(m, k), wide(n, k).t()
    with counted("sm_90", units=1) as launches:
        config = rank_r_gemm_tma.select(p, q, r)
        assert config is not None
        rank_r_gemm_tma.rank_r_gemm_tma(p, q, wide(m, r), wide(n, r).t(), None, 2.0, config)
    (item,) = launches
    assert item.programs == 1
    assert item.loaded == item.compulsory - item.stored == 2 * (m * k + n * k + m * r + n * r)
    assert item.stored == 2 * m * n


def test_a_split_reduction_is_counted_once() -> None:
    """dA over 256 rows in 4 splits: fp32 partials go out once and come back once, dA goes out once."""
    m, k, r = SHAPE.M, SHAPE.K, 16
    from fastpeft_kernels.grad_a import grad_a

    with counted("sm_90", units=8) as launches:
        grad_a(wide(8 * m, k), wide(8 * m, r), 1.0, dtype=torch.bfloat16)
    (item,) = launches
    splits = item.programs // 2
    assert splits > 1
    assert item.loaded == 2 * (8 * m * k + 2 * 8 * m * r) + 4 * splits * r * k
    assert item.stored == 4 * splits * r * k + 2 * r * k


def test_distinct_bytes_of_an_expanded_tensor() -> None:
    assert distinct_bytes(torch.empty(3, 5)) == 60
    assert distinct_bytes(torch.empty(1, 5).expand(3, 5)) == 20


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_passes_meet_their_limits(dropout: float) -> None:
    layer = Layer(shape=SHAPE, rank=16, dropout=dropout)
    rows = list(traffic.measure(layer, "sm_90"))
    assert [(row["method"], row["pass"]) for row in rows] == list(TARGETS)
    assert [problem for row in rows for problem in traffic.problems(layer, row)] == []


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("index", range(3), ids=["qkv", "grouped", "mlp"])
def test_blocks_meet_their_limits(index: int, dropout: float) -> None:
    block = blocks(**SIZES, dropout=dropout)[index]
    rows = list(traffic.measure(block, "sm_90"))
    assert [(row["method"], row["pass"]) for row in rows] == list(TARGETS)
    assert [problem for row in rows for problem in traffic.problems(block, row)] == []
    # To the byte: nothing full-size is counted that the target lacks, and nothing of it is missed.
    for row in rows:
        assert row["compulsory_wide"] == block.moved(block.target(str(row["method"]), str(row["pass"])))


@pytest.mark.parametrize("block", [QKV, GROUPED, MLP], ids=["qkv", "grouped", "mlp"])
def test_linear_by_linear_is_above_a_blocks_limit(block: Block) -> None:
    """The formulas for single-layer ops are what those are counted to move; the block's limits refuse it."""
    m, k, backward = block.tokens, block.features, "backward"
    sums = 3 * 2 * m * k * (1 if block.gated else 2)  # of dx, by autograd
    widths = [(n, k) for n in block.widths] + ([(k, block.widths[0])] if block.gated else [])
    singles = [Layer(shape=Shape(M=m, K=inside, N=n), rank=16, dropout=0.0) for n, inside in widths]
    of_each = [list(traffic.measure(layer, "sm_90")) for layer in singles]
    for (method, name), rows in zip(TARGETS, zip(*of_each, strict=True), strict=True):
        moved = sum(int(str(row["compulsory_wide"])) for row in rows)
        if block.gated:
            moved += 2 * m * block.widths[0] * (9 if name == backward else 5)  # eager torch in between
        moved += sums if name == backward else 0
        formula = next(f for f in block.peers(method, name) if f.name == "single-layer ops")
        assert block.moved(formula) == moved
        launches: list[object] = []
        for row in rows:
            assert isinstance(row["launches"], list)
            launches += row["launches"]
        said = list(traffic.problems(block, {**rows[0], "launches": launches, "compulsory_wide": moved}))
        assert len(said) == 2, said


def test_eager_blocks_are_peft_linear_by_linear() -> None:
    """MiB at 8192x4096x4096: three times 608, two additions of dx; of the MLP, its three linears and F."""
    qkv, _, mlp = blocks(
        **(SIZES | {"tokens": 8192, "features": 4096, "out": 4096, "d_ff": 14336}), dropout=0
    )
    peft = {
        (block.name, *key): formula
        for block in (qkv, mlp)
        for key in TARGETS
        for formula in block.peers(*key)
        if formula.name.startswith("PEFT")
    }
    assert qkv.moved(peft["q/k/v", "lora", "forward"]) == 3 * 608 * 2**20
    assert qkv.moved(peft["q/k/v", "lora", "backward"]) == (3 * 736 + 2 * 3 * 64) * 2**20
    assert qkv.moved(peft["q/k/v", "dora", "backward"]) == (3 * 1696 + 2 * 3 * 64) * 2**20
    # X = Y = 64, each W = 112, F = 224: gate and up 2X+W+7F each, down 2F+W+7Y, the activation 5F.
    forward = 2 * (2 * 64 + 112 + 7 * 224) + (2 * 224 + 112 + 7 * 64) + 5 * 224
    assert mlp.moved(peft["gated MLP", "lora", "forward"]) == forward * 2**20
    assert peft["gated MLP", "lora", "forward"].text() == "4X+W+21F+7Y"
    assert peft["gated MLP", "lora", "forward"].launches == 3 * 5 + 2
    assert peft["gated MLP", "lora", "backward"].launches == 3 * 7 + 3 + 1


@pytest.mark.parametrize("block", [GROUPED, MLP], ids=["grouped", "mlp"])
def test_block_limits_stop_more_launches_and_more_bytes(block: Block) -> None:
    for row in traffic.measure(block, "sm_90"):
        assert list(traffic.problems(block, row)) == []
        launches, wide_bytes = row["launches"], row["compulsory_wide"]
        assert isinstance(launches, list)
        assert isinstance(wide_bytes, int)
        assert list(traffic.problems(block, {**row, "compulsory_wide": wide_bytes + 1}))
        assert list(traffic.problems(block, {**row, "launches": [*launches, None]}))


def test_limits_stop_more_launches_and_more_bytes() -> None:
    layer = Layer(shape=SHAPE, rank=16, dropout=0.0)
    row = next(traffic.measure(layer, "sm_90"))
    wide_bytes = 2 * (2 * SHAPE.M * SHAPE.K + SHAPE.N * SHAPE.K + SHAPE.M * SHAPE.N)
    assert row["compulsory_wide"] == wide_bytes
    assert list(traffic.problems(layer, row)) == []
    assert list(traffic.problems(layer, {**row, "compulsory_wide": wide_bytes + 1}))
    assert list(traffic.problems(layer, {**row, "launches": [None] * 3}))


def test_formulas_are_those_of_the_published_table() -> None:
    """MiB at 8192x4096x4096 less the rank's terms, as modelled for LoRA's and DoRA's implementations."""
    mib = 2**20
    whole = {
        key: {peer.name: peer.bytes(8192, 4096, 4096) / mib for peer in peers} for key, peers in PEERS.items()
    }
    assert whole["lora", "forward"]["PEFT in bf16"] == 608
    assert whole["lora", "backward"] == {"Axolotl": 544, "Unsloth": 608, "PEFT in bf16": 736}
    assert whole["dora", "forward"] == {"Scaling DoRA": 1088, "PEFT": 1344}
    assert whole["dora", "forward, norm cached"] == {"Axolotl": 928}
    assert TARGETS["dora", "backward"].text() == "2X+W+3Y"
    assert whole["dora", "backward"] == {"PEFT": 1696}
    assert set(PUBLISHED) <= set(PEERS) == set(TARGETS)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "traffic.json"
    words = ["traffic", "--shape", "256x128x384", "--ranks", "16"]
    assert bench_cli.main([*words, "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "2X+W+3Y" in out
    document = json.loads(target.read_text())
    assert document["command"] == "python -m bench " + " ".join(words)
    # Of the layer and of each block: two passes of LoRA, three of DoRA.
    assert len(document["results"]) == 4 * 5
    assert [row.get("block") for row in document["results"][::5]] == [None, QKV.name, GROUPED.name, MLP.name]
    assert "gated MLP 256x128x448, bf16, r=16" in out
