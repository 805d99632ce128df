"""The methods that `classify.py` compares: one entry each, so that another is one more entry.

An entry makes the optimiser of a fresh model whose head is fitted already; the head trains beside every
method, at a rate of its own. A method that an encoder cannot have says so itself, and the table repeats it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fastpeft
from classifier import HEAD, Classifier, groups

HEAD_RATE = 1e-4  # it starts fitted
RANK, ALPHA = 8, 16
BOTTLENECK = 64
TOKENS = 16  # of prompts and prefixes


@dataclass(frozen=True)
class Run:
    """What an entry may want to know of the training to come."""

    rate: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Entry:
    """A method: its name in the table, the rates it is tried with, and how it makes its optimiser.

    No rates: nothing trains beyond the head that every method starts from.
    """

    label: str
    rates: tuple[float, ...]
    build: Callable[[Classifier, Run], torch.optim.Optimizer] | None = None


def patched(config: Any) -> Callable[[Classifier, Run], torch.optim.Optimizer]:
    """AdamW on the adapters of a configuration."""

    def build(model: Classifier, run: Run) -> torch.optim.Optimizer:
        torch.manual_seed(run.seed)
        fastpeft.patch(model, config)
        return torch.optim.AdamW(groups(model, run.rate, HEAD_RATE), weight_decay=0.0)

    return build


def scheduled(
    schedule: Callable[[Run], Any], config: Any = None
) -> Callable[[Classifier, Run], torch.optim.Optimizer]:
    """AdamW on a few blocks at a time: of the model's own, or of adapters."""

    def build(model: Classifier, run: Run) -> torch.optim.Optimizer:
        torch.manual_seed(run.seed)
        if config is not None:
            fastpeft.patch(model, config)
        return fastpeft.LayerSparseAdamW(
            model,
            run.rate,
            weight_decay=0.0,
            schedule=schedule(run),
            params=groups(model, run.rate, HEAD_RATE),
        )

    return build


def full(model: Classifier, run: Run) -> torch.optim.Optimizer:
    """AdamW on everything."""
    return torch.optim.AdamW(groups(model, run.rate, HEAD_RATE), weight_decay=0.0)


def loraplus(model: Classifier, run: Run) -> torch.optim.Optimizer:
    """LoRA with the paper's ratio of 16 between B's rate and A's."""
    torch.manual_seed(run.seed)
    fastpeft.patch(model, lora())
    head = {id(p) for p in model.head.parameters()}
    found = fastpeft.loraplus_groups(model, run.rate)
    for group in found:
        group["params"] = [p for p in group["params"] if id(p) not in head]
    found.append({"params": list(model.head.parameters()), "lr": HEAD_RATE})
    return torch.optim.AdamW([group for group in found if group["params"]], weight_decay=0.0)


def adalora(model: Classifier, run: Run) -> torch.optim.Optimizer:
    """AdaLoRA from rank 12 to 8 on average, allocated between a fifth and three quarters of the steps."""
    config = fastpeft.AdaLoRA(
        init_r=12,
        target_r=RANK,
        tinit=run.steps // 5,
        tfinal=run.steps // 4,
        total_step=run.steps,
        lora_alpha=2 * 12,  # times 1 / init_r: the scaling of the others
        modules_to_save=(HEAD,),
    )
    optimizer = patched(config)(model, run)
    fastpeft.RankAllocator(model, optimizer)
    return optimizer


def intrinsic(model: Classifier, run: Run) -> torch.optim.Optimizer:
    """1000 numbers for the whole encoder, in another subspace for every seed."""
    config = fastpeft.IntrinsicDimension(d=1000, seed=run.seed, modules_to_save=(HEAD,))
    return patched(config)(model, run)


def lora(**options: Any) -> fastpeft.LoRA:
    """LoRA on every linear of the blocks."""
    return fastpeft.LoRA(r=RANK, lora_alpha=ALPHA, modules_to_save=(HEAD,), **options)


WEIGHTS = (2e-5, 5e-5, 1e-4)  # rates for the model's own weights
TURNS = (5e-5, 1e-4, 2e-4)  # for those of a few blocks at a time
ADAPTERS = (1e-3, 2e-3, 4e-3)  # for matrices that start at zero

ENTRIES: dict[str, Entry] = {
    "full": Entry("full fine-tuning", WEIGHTS, full),
    "probe": Entry("linear probe", ()),
    "lora": Entry("LoRA", ADAPTERS, patched(lora())),
    "rslora": Entry("rsLoRA", ADAPTERS, patched(lora(use_rslora=True))),
    "dora": Entry("DoRA", ADAPTERS, patched(lora(use_dora=True))),
    "lora+": Entry("LoRA+", (1e-4, 2e-4, 5e-4), loraplus),
    "lora-fa": Entry("LoRA-FA", (2e-3, 4e-3, 8e-3), patched(lora(freeze_lora_A=True))),
    "ln-lora": Entry(
        "LN-LoRA",
        (2.5e-4, 5e-4, 1e-3),
        patched(fastpeft.LNLoRA(r=RANK, lora_alpha=ALPHA, modules_to_save=(HEAD,))),
    ),
    "adalora": Entry("AdaLoRA, r=12 to 8", ADAPTERS, adalora),
    "vera": Entry("VeRA, r=256", (5e-3, 1e-2, 2e-2), patched(fastpeft.VeRA(modules_to_save=(HEAD,)))),
    "pissa": Entry("PiSSA", (1e-4, 2e-4, 5e-4), patched(lora(init_lora_weights="pissa"))),
    "olora": Entry("OLoRA", (1e-4, 2e-4, 5e-4), patched(lora(init_lora_weights="olora"))),
    "bitfit": Entry("BitFit", (1e-3, 2e-3, 4e-3), patched(fastpeft.BitFit(modules_to_save=(HEAD,)))),
    "series": Entry(
        "series adapters",
        ADAPTERS,
        patched(fastpeft.SeriesAdapter(bottleneck_size=BOTTLENECK, modules_to_save=(HEAD,))),
    ),
    # BERT's blocks have no module for the whole MLP, whose input it would take; the attention is one.
    "parallel": Entry(
        "parallel adapters, on attention",
        ADAPTERS,
        patched(
            fastpeft.ParallelAdapter(
                bottleneck_size=BOTTLENECK, target_modules=("attention",), modules_to_save=(HEAD,)
            )
        ),
    ),
    "prefix": Entry("prefix tuning", (1e-2,), patched(fastpeft.PrefixTuning(num_virtual_tokens=TOKENS))),
    "prompt": Entry("prompt tuning", (1e-2,), patched(fastpeft.PromptTuning(num_virtual_tokens=TOKENS))),
    "intrinsic": Entry("intrinsic dimension, d=1000", (1e-3, 3e-3, 1e-2), intrinsic),
    "topk": Entry("top-K, 2 blocks", TURNS, scheduled(lambda run: fastpeft.TopK(2, seed=run.seed))),
    "lisa": Entry("LISA, 2 blocks", TURNS, scheduled(lambda run: fastpeft.LISA(2, 10, run.seed))),
    "badam": Entry("BAdam", (1e-4, 2e-4, 4e-4), scheduled(lambda run: fastpeft.BAdam(10, seed=run.seed))),
    "ist": Entry(
        "IST on LoRA, 2 blocks",
        (2e-3, 4e-3, 8e-3),
        scheduled(lambda run: fastpeft.IST(2, seed=run.seed, update_every=10, score_lr=100.0), lora()),
    ),
}
