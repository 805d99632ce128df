"""One rank of test_norm_cache.py's FSDP2 test: `python tests/fsdp2_worker.py STORE RANK`, or under torchrun.

Trains a small DoRA model sharded by fully_shard in two gloo processes, with two backward passes a step, and
beside it the same model in this process alone, on both ranks' batches. FSDP2 gathers every parameter anew
into the same object without a new ``_version``: a norm that went by these alone would be stale.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.layers import norm_cache

WORLD, STEPS, MICRO_BATCHES = 2, 3, 2
POLICIES = ("cpu", "gpu", *(("kernels",) if os.environ.get("TRITON_INTERPRET") == "1" else ()))
CASES = list(itertools.product(POLICIES, (False, True), (True, False)))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    config = fastpeft.LoRA(r=2, use_dora=True, init_lora_weights=False, target_modules="all-linear")
    return fastpeft.patch(model, config)


def batch(step: int, micro: int, rank: int) -> torch.Tensor:
    seed = (step * MICRO_BATCHES + micro) * WORLD + rank
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: torch.Tensor, *, recompute: bool) -> torch.Tensor:
    return (checkpoint(model, x, use_reentrant=False) if recompute else model(x)).square().mean()


def trained_alone(rank: int) -> list[float]:
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            for other in range(WORLD):
                loss = loss_of(model, batch(step, micro, other), recompute=False)
                (loss / WORLD).backward()
                if other == rank:
                    losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, loss_after_a_write(model, rank)]


def loss_after_a_write(model: nn.Module, rank: int) -> float:
    """As after a checkpoint is loaded between two forwards: nothing in a sharded layer tells."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5 if "lora" in name else 0.5)
        return loss_of(model, batch(0, 0, rank), recompute=False).item()


def trained_sharded(rank: int, *, recompute: bool, reshard: bool) -> list[float]:
    model = make_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            loss = loss_of(model, batch(step, micro, rank), recompute=recompute)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, loss_after_a_write(model, rank)]


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        store, rank = sys.argv[1], int(sys.argv[2])
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    else:
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo")
    alone = trained_alone(rank)
    look = norm_cache._look
    # An allocator may hand out the same address every time, so a cache must do without it.
    norm_cache._look = lambda tensor: look(tensor)[1:]
    for policy, recompute, reshard in CASES:
        # A GPU's policies on CPU tensors; the kernels in Triton's interpreter.
        norm_cache._is_cpu = lambda tensor, policy=policy: policy == "cpu"
        norm_cache._runs_kernels = lambda weight, policy=policy: policy == "kernels"
        sharded = trained_sharded(rank, recompute=recompute, reshard=reshard)
        torch.testing.assert_close(torch.tensor(sharded), torch.tensor(alone), rtol=1e-5, atol=0.0)
    print("same losses")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
