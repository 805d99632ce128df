"""Adapters in and out of any contender, through PEFT's file keys: the names all sides already promise."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bench import peer_linears

WEIGHTS = "adapter_model.safetensors"


def save(model: nn.Module, folder: Path) -> None:
    """Write the adapters of `model`, PEFT's, fastpeft's or a peer's, under PEFT's keys."""
    from safetensors.torch import save_file

    if hasattr(model, "peft_config"):
        # Without the flag PEFT may ask the hub whether the embedding was resized.
        cast("Any", model).save_pretrained(folder, save_embedding_layers=False)
    elif found := peer_linears.parts(model):
        tensors = {key: parameter.detach().contiguous() for key, parameter in found.items()}
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / WEIGHTS)
    else:
        import fastpeft

        fastpeft.save(model, folder)


def load(model: nn.Module, folder: Path) -> None:
    """Read adapters written by :func:`save`, of any side, into `model`, of any side."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, tensors)
    elif found := peer_linears.parts(model):
        if found.keys() != tensors.keys():
            raise ValueError(f"adapters differ: {sorted(found.keys() ^ tensors.keys())[:3]}")
        with torch.no_grad():
            for key, parameter in found.items():
                parameter.copy_(tensors[key])
    else:
        import fastpeft

        fastpeft.load(model, folder)


def copy(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the adapters of `source`."""
    with tempfile.TemporaryDirectory() as folder:
        save(source, Path(folder))
        load(target, Path(folder))
