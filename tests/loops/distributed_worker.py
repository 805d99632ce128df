"""One rank of test_distributed.py: `python distributed_worker.py FOLDER RANK`, or under torchrun with FOLDER.

Trains a tiny Llama in two gloo processes, under DDP and under FSDP2, patched plainly and in place, LoRA and
DoRA, and beside each the same in this process alone on both ranks' batches: the losses must be the same.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastpeft
from tests.models import VOCABULARY, llama

WORLD, STEPS = 2, 3


def make_model(in_place: bool, use_dora: bool) -> nn.Module:
    torch.manual_seed(0)
    if in_place:
        config = LoraConfig(r=2, use_dora=use_dora, init_lora_weights=False, target_modules="all-linear")
        return fastpeft.patch(get_peft_model(llama(), config)).train()
    return fastpeft.patch(llama(), fastpeft.LoRA(r=2, use_dora=use_dora, init_lora_weights=False)).train()


def batch(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * WORLD + rank)
    return torch.randint(0, VOCABULARY, (2, 6), generator=generator)


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    ids = batch(step, rank)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def train(model: nn.Module, ranks: list[int], watched: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for step in range(STEPS):
        for rank in ranks:
            loss = loss_of(model, step, rank)
            (loss / len(ranks)).backward()
            if rank == watched:
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    inner = (
        model.base_model.model if hasattr(model, "base_model") and hasattr(model, "peft_config") else model
    )
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check(folder: Path, rank: int, in_place: bool, use_dora: bool) -> None:
    alone = make_model(in_place, use_dora)
    expected = train(alone, list(range(WORLD)), rank)
    ddp = DistributedDataParallel(make_model(in_place, use_dora))
    torch.testing.assert_close(
        torch.tensor(train(ddp, [rank], rank)), torch.tensor(expected), rtol=1e-4, atol=0
    )
    model = sharded(make_model(in_place, use_dora))
    torch.testing.assert_close(
        torch.tensor(train(model, [rank], rank)), torch.tensor(expected), rtol=1e-4, atol=0
    )
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, value in alone.state_dict().items():
        if rank == 0:
            torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-5)
    if in_place:
        return
    fastpeft.save(model, folder / "sharded")
    if rank == 0:
        fastpeft.save(alone, folder / "alone")
        files = [load_file(folder / name / "adapter_model.safetensors") for name in ("sharded", "alone")]
        assert files[0].keys() == files[1].keys()
        for key, value in files[0].items():
            torch.testing.assert_close(value, files[1][key], rtol=1e-4, atol=1e-5)
    dist.barrier()
    fresh = sharded(make_model(in_place, use_dora))
    fastpeft.load(fresh, folder / "sharded")
    with torch.no_grad():
        torch.testing.assert_close(loss_of(fresh, 0, rank), loss_of(model, 0, rank))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if len(sys.argv) == 3:
        rank = int(sys.argv[2])
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    else:
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo")
    for in_place, use_dora in itertools.product((False, True), (False, True)):
        check(folder, rank, in_place, use_dora)
    print("same losses")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
