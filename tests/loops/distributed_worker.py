"""One rank of test_distributed.py, under torchrun: `distributed_worker.py FOLDER CASE...`.

Trains a tiny Llama in two gloo processes, under DDP and under FSDP2, and beside each the same in this process
alone on both ranks' batches: the losses must be the same. What FSDP2 saves is what one process saves: the
same bytes before training, the same numbers to rounding after it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
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
FILES = ("adapter_config.json", "adapter_model.safetensors")


def in_place(use_dora: bool) -> nn.Module:
    config = LoraConfig(r=2, use_dora=use_dora, init_lora_weights=False, target_modules="all-linear")
    return fastpeft.patch(get_peft_model(llama(), config))


def plain(config: object) -> Callable[[], nn.Module]:
    return lambda: fastpeft.patch(llama(), config)


CASES: dict[str, Callable[[], nn.Module]] = {
    "lora": plain(fastpeft.LoRA(r=2, init_lora_weights=False)),
    "dora": plain(fastpeft.LoRA(r=2, use_dora=True, init_lora_weights=False)),
    "lora-in-place": lambda: in_place(False),
    "dora-in-place": lambda: in_place(True),
    "vera": plain(fastpeft.VeRA(r=6, init_weights=False, target_modules="all-linear")),
    "fastfood": plain(fastpeft.IntrinsicDimension(d=50)),
    "hashed-scales": plain(fastpeft.IntrinsicDimension(d=50, projection="hashed", structure_aware=True)),
}


def make_model(case: str) -> nn.Module:
    """The same in every process, with no trained value where it starts."""
    torch.manual_seed(0)
    model = CASES[case]().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * WORLD + rank)
    return torch.randint(0, VOCABULARY, (2, 6), generator=generator)


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    ids = batch(step, rank)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def train(model: nn.Module, ranks: list[int], watched: int) -> torch.Tensor:
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
    return torch.tensor(losses)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save(model: nn.Module, folder: Path, is_sharded: bool, rank: int) -> None:
    """As a user saves: every rank calls for a sharded model, the first one alone for another."""
    if hasattr(model, "peft_config"):
        state = whole_state(model) if is_sharded else None
        if rank == 0:
            model.save_pretrained(folder, state_dict=state)
    elif is_sharded or rank == 0:
        fastpeft.save(model, folder)


def check_saves(alone: nn.Module, model: nn.Module, folder: Path, rank: int, *, trained: bool) -> None:
    save(alone, folder / "alone", False, rank)
    save(model, folder / "sharded", True, rank)
    if rank == 0:
        for name in FILES:
            same = (folder / "alone" / name).read_bytes() == (folder / "sharded" / name).read_bytes()
            assert same or (trained and name == FILES[1]), f"{folder}/{name}"
        expected, found = (load_file(folder / name / FILES[1]) for name in ("alone", "sharded"))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    dist.barrier()


def check(case: str, folder: Path, rank: int) -> None:
    alone, model = make_model(case), sharded(make_model(case))
    check_saves(alone, model, folder / "untrained", rank, trained=False)
    expected = train(alone, list(range(WORLD)), rank)
    ddp = DistributedDataParallel(make_model(case))
    torch.testing.assert_close(train(ddp, [rank], rank), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(train(model, [rank], rank), expected, rtol=1e-4, atol=0)
    whole = whole_state(model)
    for name, value in alone.state_dict().items():
        if rank == 0:
            torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-5)
    check_saves(alone, model, folder / "trained", rank, trained=True)
    if hasattr(model, "peft_config"):
        return
    fresh = sharded(make_model(case))
    fastpeft.load(fresh, folder / "trained" / "sharded")
    with torch.no_grad():
        torch.testing.assert_close(loss_of(fresh, 0, rank), loss_of(model, 0, rank))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case in cases:
        check(case, Path(folder) / case, rank)
        print(f"{case}: same losses", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
