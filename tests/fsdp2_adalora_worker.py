"""One rank of test_rank_allocation.py's FSDP2 test: `python -m tests.fsdp2_adalora_worker STORE RANK`.

Trains a small AdaLoRA model, whose loss is its output's, sharded by fully_shard in two gloo processes, and
beside it the same model in this process alone, on both ranks' batches: the same losses and the same ranks.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastpeft

WORLD, STEPS = 2, 9


class Model(nn.Module):
    """Two linears and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.second(self.first(x).relu()).square().mean())


def make_model() -> Model:
    torch.manual_seed(0)
    options = {"init_r": 6, "target_r": 2, "total_step": STEPS, "tinit": 1, "tfinal": 3}
    config = fastpeft.AdaLoRA(target_modules="all-linear", init_lora_weights=False, lora_alpha=1, **options)
    return fastpeft.patch(Model().train(), config)


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(step * WORLD + rank))


def train(model: Model, ranks: tuple[int, ...]) -> tuple[list[float], dict[str, tuple[bool, ...]]]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    allocator = fastpeft.RankAllocator(model, optimizer)
    losses = []
    for step in range(STEPS):
        for rank in ranks:
            loss = model(batch(step, rank)).loss
            (loss / len(ranks)).backward()
            if rank == dist.get_rank():
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, allocator.pattern


def main() -> None:
    torch.set_num_threads(1)
    store, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    alone, expected = train(make_model(), tuple(range(WORLD)))
    model = make_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh)
    sharded, pattern = train(model, (rank,))
    torch.testing.assert_close(torch.tensor(sharded), torch.tensor(alone), rtol=1e-4, atol=0.0)
    assert pattern == expected
    assert sum(map(sum, pattern.values())) == 4
    print("same ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
