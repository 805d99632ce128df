"""Which triplets matter, and which of them a budget pays for (arXiv 2303.10512, sections 3.2 and 3.3).

With ``I = |w * dL/dw|`` of a number w at a step, its score is the product of two running means,

    sensitivity  S <- beta1 S + (1 - beta1) I        uncertainty  U <- beta2 U + (1 - beta2) |I - S|

and the score of a triplet is that of its E, and the means of those of its row of A and its column of B. The
operations and their order are those of PEFT's allocator: the same gradients give the same scores to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastpeft import sharding
from fastpeft.layers.adalora import KINDS, Ranks
from fastpeft.methods.adalora import AdaLoRA

Parameters = Mapping[str, Mapping[str, nn.Parameter]]  # by module path and kind


def budget_at(config: AdaLoRA, step: int, triplets: int, layers: int) -> tuple[int, bool]:
    """Return how many triplets there may be after a step, and whether it is one that allocates.

    Args:
        config: the schedule.
        step: 0, 1, ...
        triplets: of all layers, at first.
        layers: how many there are.
    """
    target, last = config.target_r * layers, config.total_step - config.tfinal
    if step <= config.tinit:
        return triplets, False
    if step >= last:
        return target, True
    left = 1 - (step - config.tinit) / (last - config.tinit)
    return int((triplets - target) * left**3 + target), step % config.deltaT == 0


@torch.no_grad()
def update_scores(ranks: Ranks, parameters: Parameters, betas: tuple[float, float]) -> int:
    """Take the gradients into the scores; return how many parameters had one.

    One without a gradient (its block does not train now) keeps its last scores.

    Args:
        ranks: the scores; changed.
        parameters: of every layer.
        betas: of the two means.
    """
    beta1, beta2 = betas
    scored = [
        (f"{path}.{kind}", parameter, parameter.grad)
        for path, members in parameters.items()
        for kind, parameter in members.items()
        if parameter.grad is not None
    ]
    for name, parameter, _ in scored:
        if name not in ranks.scores:
            ranks.scores[name] = (torch.zeros_like(parameter), torch.zeros_like(parameter))
    if not scored:
        return 0
    # One call for all of them each time: there are three parameters a layer, and six operations on each.
    sensitivity = [ranks.scores[name][0] for name, _, _ in scored]
    uncertainty = [ranks.scores[name][1] for name, _, _ in scored]
    now = torch._foreach_mul([p.detach() for _, p, _ in scored], [g for _, _, g in scored])
    torch._foreach_abs_(now)
    torch._foreach_mul_(sensitivity, beta1)
    torch._foreach_add_(sensitivity, torch._foreach_mul(now, 1 - beta1))
    torch._foreach_sub_(now, sensitivity)
    torch._foreach_abs_(now)
    torch._foreach_mul_(now, 1 - beta2)
    torch._foreach_mul_(uncertainty, beta2)
    torch._foreach_add_(uncertainty, now)
    return len(scored)


@torch.no_grad()
def triplet_scores(ranks: Ranks, parameters: Parameters) -> Tensor:
    """Return the scores of all triplets [sum of r], layer by layer; 0 where nothing has been scored yet."""
    found = []
    device = next(iter(parameters.values()))["lora_E"].device
    for path, members in parameters.items():
        A, E, B = (_elements(ranks, f"{path}.{kind}", members[kind]) for kind in KINDS)
        vectors = torch.stack([A.mean(dim=1), B.mean(dim=0)], dim=1).sum(dim=1)
        found.append((E.view(-1) + vectors).to(device))
    return torch.cat(found)


def _elements(ranks: Ranks, name: str, like: Tensor) -> Tensor:
    if name not in ranks.scores:
        return torch.zeros_like(sharding.gathered(like.detach()))
    sensitivity, uncertainty = ranks.scores[name]
    return sharding.gathered(sensitivity * uncertainty)


@torch.no_grad()
def kept_within(scores: Tensor, budget: int) -> Tensor:
    """Return which triplets stay [sum of r]: those above the score that the budget ends at."""
    too_many = len(scores) - budget
    if too_many <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(scores, too_many).values
    return ~(scores <= threshold)  # not >: a score that is no number stays, as in PEFT


@torch.no_grad()
def mask(triplets: Sequence[nn.Parameter], kept: Tensor) -> None:
    """Set to zero what is not kept.

    Args:
        triplets: every layer's ``lora_E`` [r, 1].
        kept: [sum of r].
    """
    parts = torch.split(kept, [E.shape[0] for E in triplets])
    for E, stays in zip(triplets, parts, strict=True):
        goes = ~stays[:, None].to(E.device)
        if sharding.is_sharded([E]):
            sharding.copy_into(E, sharding.gathered(E.detach()).masked_fill(goes, 0.0))
        else:
            E.masked_fill_(goes, 0.0)
