"""The benchmark's cases under pytest-benchmark: the same builders, the same gate, sizes for a moment.

`python -m pytest tests/test_bench_cases.py --benchmark-only` prints their times; no test depends on one.
"""

from __future__ import annotations

import pytest
import torch

from bench import contenders, layer_sparse, layers, models, optimizer, parity, single
from bench.adapter import Adapter
from bench.blocks import BLOCKS, Problem, Shape
from fastpeft import LISA

TINY = models.WORKLOADS["tiny"]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("side", [*single.OURS, "plain"])
def test_block(benchmark, side, dora, block):
    problem = Problem(block=block, shape=Shape(M=24, K=32, N=48), dtype=torch.float32)
    adapter = Adapter(rank=4, dora=dora)
    layer = (single.OURS | single.PEERS)[side](problem, adapter)
    assert parity.failure(single.check(layer, problem, adapter)) is None
    phases = benchmark.pedantic(layers.timed(layer), rounds=2)
    assert phases["both"] == pytest.approx(phases["forward"] + phases["backward"])


@pytest.mark.parametrize("name", [*contenders.NAMES, "lisa", "ist"])
def test_step(benchmark, name):
    base, ids = TINY.build(torch.float32), TINY.batch_ids()
    if name in layer_sparse.METHODS:
        settings = layer_sparse.Settings(layers=1, period=2, rank=4)
        contender, _ = layer_sparse.build(name, base, ids, settings)
    else:
        contender = contenders.build(name, base, ids, 4)
    # All of them: under a schedule others may train in the steps that are timed.
    before = [parameter.detach().clone() for parameter in contender.model.parameters()]
    phases = benchmark.pedantic(contender.step, rounds=2)
    assert set(phases) == {"step", "forward", "backward", "optimizer"}
    moved = [not torch.equal(a, b) for a, b in zip(before, contender.model.parameters(), strict=True)]
    assert any(moved) == bool(contender.trainable)


def test_optimizer_step(benchmark):
    base = TINY.build(torch.float32)
    ours = optimizer.sparse(base, LISA(1, 100), False, "drop", foreach=True)
    assert optimizer.difference(ours, optimizer.torchs(ours.model, foreach=True)) is None
    assert benchmark.pedantic(ours.step, rounds=2)["step"] > 0
