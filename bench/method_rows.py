"""Every method of fine-tuning on a whole model, ours and PEFT's where PEFT has it: for the suite `memory`."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.contenders import Contender
from bench.models import Workload
from fastpeft.methods.registry import is_ours
from fastpeft.planning.names import NAMES, named

DETAILED = ("lora", "dora")
"""They have rows of their own, by dropout."""
METHODS = tuple(name for name in NAMES if name not in DETAILED and is_ours(named(name)))
"""Of the planner's names those that are adapters; schedules are in the suite `sparse`."""
WITH_BIASES = ("bitfit",)
"""Measured on the model with biases on its linears, since it trains nothing else."""


def fastpeft_row(name: str, base: nn.Module, ids: Tensor, rank: int) -> Contender:
    """fastpeft's, with the method's own defaults, LoRA-FA's rank apart."""
    import fastpeft

    torch.manual_seed(1)
    model = fastpeft.patch(copy.deepcopy(base), _config(name, rank)).train()
    return Contender(f"fastpeft-{name}", model, ids)


def peft_row(name: str, base: nn.Module, ids: Tensor, rank: int) -> Contender:
    """PEFT's, of the same size on the same modules.

    Raises:
        KeyError: PEFT has no such method.
    """
    from peft import get_peft_model

    model = copy.deepcopy(base)
    config = PEFT[name](_config(name, rank))
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute it renamed
        wrapped = cast("nn.Module", get_peft_model(cast("Any", model), config))
    if name == "lora-fa":  # as PEFT's optimiser of that name wants it
        for path, parameter in wrapped.named_parameters():
            if "lora_A" in path:
                parameter.requires_grad_(False)
    return Contender(f"peft-{name}", wrapped.train(), ids)


def base_for(name: str, workload: Workload, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model that a method is measured on, where it is not everybody's."""
    return workload.build(dtype, device=device, biases=name in WITH_BIASES)


def _config(name: str, rank: int) -> Any:
    config = named(name)
    return dataclasses.replace(config, r=rank) if name == "lora-fa" else config


def _lora(ours: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=ours.r, lora_alpha=ours.lora_alpha, target_modules="all-linear")


def _vera(ours: Any) -> Any:
    from peft import VeraConfig

    return VeraConfig(r=ours.r, target_modules="all-linear", d_initial=ours.d_initial)


def _adalora(ours: Any) -> Any:
    from peft import AdaLoraConfig

    fields = ("init_r", "target_r", "total_step", "lora_alpha")
    return AdaLoraConfig(target_modules="all-linear", **{name: getattr(ours, name) for name in fields})


def _prefix(ours: Any) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ours.num_virtual_tokens)


def _prompt(ours: Any) -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=ours.num_virtual_tokens)


PEFT: dict[str, Callable[[Any], Any]] = {
    "lora-fa": _lora,
    "adalora": _adalora,
    "vera": _vera,
    "prefix": _prefix,
    "prompt": _prompt,
}
"""By our name, PEFT's configuration of the same; it has no other of the methods."""
