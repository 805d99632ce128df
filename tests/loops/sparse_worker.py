"""One rank of test_layer_sparse_distributed.py, under torchrun: DDP and FSDP2 train as one process does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastpeft
from fastpeft import IST, LISA, BAdam, LayerSparseAdamW
from fastpeft.errors import CheckpointError, LayerSparseError
from tests.test_layer_sparse import llama, patched

STEPS = 7
SAVED = 3  # steps before a save: in the middle of an interval


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(step * 2 + rank))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: list[int],
    watched: int,
    steps: range = range(STEPS),
) -> list[float]:
    losses = []
    for step in steps:
        for rank in ranks:
            loss = model(input_ids=batch(step, rank), labels=batch(step, rank)).loss
            (loss / len(ranks)).backward()
            if rank == watched:
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sharded(make: Callable[[], nn.Module]) -> tuple[nn.Module, LayerSparseAdamW]:
    """FSDP2, a block per group."""
    model: Any = make().train()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model, LayerSparseAdamW(model, 0.02, 0.1, LISA(2, 2))


def check_saves(folder: Path, rank: int, expected: list[float]) -> None:
    """Two ranks go on with what one process saved, and with what they saved; the test goes on with that."""
    first, then = range(SAVED), range(SAVED, STEPS)
    model, optimizer = sharded(llama)
    fastpeft.load_training(model, optimizer, folder / "of-one")
    assert train(model, optimizer, [rank], rank, then) == pytest.approx(expected[SAVED:], rel=1e-4)
    model, optimizer = sharded(llama)
    train(model, optimizer, [rank], rank, first)
    fastpeft.save_training(model, optimizer, folder / "of-two", extra={"steps": SAVED})
    assert len(list((folder / "of-two").rglob("*.safetensors"))) == 2
    again = train(model, optimizer, [rank], rank, then)
    model, optimizer = sharded(llama)
    assert fastpeft.load_training(model, optimizer, folder / "of-two") == {"steps": SAVED}
    assert train(model, optimizer, [rank], rank, then) == again
    with pytest.raises(CheckpointError, match="cannot write"):
        fastpeft.save_training(model, optimizer, folder / "a-file")


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, make, schedule, options in (
        ("lisa", llama, LISA(2, 2), {}),
        ("badam", llama, BAdam(2), {"always_on": ["head"]}),
        ("lora", patched, LISA(2, 2), {}),
        ("ist", patched, IST(layers=2, update_every=100), {}),
    ):
        for wrap_first in (False, True):
            alone = make().train()
            expected = train(alone, LayerSparseAdamW(alone, 0.02, 0.1, schedule, **options), [0, 1], rank)
            inner = make().train()
            if wrap_first:
                model = DistributedDataParallel(inner)
                optimizer = LayerSparseAdamW(model, 0.02, 0.1, schedule, **options)
            else:
                optimizer = LayerSparseAdamW(inner, 0.02, 0.1, schedule, **options)
                model = DistributedDataParallel(inner)
            found = train(model, optimizer, [rank], rank)
            assert found == pytest.approx(expected, rel=1e-4), (name, wrap_first)
    # Active gradients alone are reduced.
    inner = llama().train()
    optimizer = LayerSparseAdamW(inner, 0.02, schedule=LISA(2, 1), always_on=())
    model = DistributedDataParallel(inner)
    for step in range(4):
        active = sum(p.nbytes for p in inner.parameters() if p.requires_grad)
        model(input_ids=batch(step, rank), labels=batch(step, rank)).loss.backward()
        size = sum(bucket.buffer().nbytes for bucket in model.reducer._get_zeros_like_grad_buckets())
        assert size == active, (size, active)
        optimizer.step()
        optimizer.zero_grad()
    # Another seed on the other rank: refused, on both, and the models as they were.
    with pytest.raises(LayerSparseError, match="same schedule and seed"):
        LayerSparseAdamW(llama(), schedule=LISA(2, 2, seed=rank))
    # FSDP2, a block per group.
    for make in (llama, patched):
        alone = make().train()
        expected = train(alone, LayerSparseAdamW(alone, 0.02, 0.1, LISA(2, 2)), [0, 1], rank)
        model, optimizer = sharded(make)
        found = train(model, optimizer, [rank], rank)
        assert found == pytest.approx(expected, rel=1e-4), f"fsdp {make.__name__}"
        moments = sum(s["exp_avg"].to_local().numel() for s in optimizer.state.values())
        assert 0 < moments < 0.75 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        if make is llama:
            check_saves(Path(sys.argv[1]), rank, expected)
    dist.destroy_process_group()
    print("ok", file=sys.stderr)


if __name__ == "__main__":
    main()
