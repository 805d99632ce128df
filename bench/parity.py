"""The gate before every timing: no speed for a contender that computes something else.

Both sides run in the benchmark's dtype and are compared to PEFT's own code in a wider one (float32 for
the 16-bit types, float64 for float32). A contender passes when its distance to that truth is at most twice
PEFT's, or below the dtype's unit roundoff, which no result stored in that dtype can beat reliably.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.contenders import Contender

FACTOR = 2.0

Group = dict[str, Tensor]
"""Tensors of one kind by name, for example the gradients of all `lora_A`."""


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What one forward and backward pass produced."""

    groups: dict[str, Group] = field(default_factory=dict)
    """Outputs and gradients by kind."""
    token_losses: Tensor | None = None
    """Loss of each predicted token, computed in fp64 from the logits."""
    loss: float | None = None
    """The loss the model itself reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One compared quantity."""

    quantity: str
    """What was compared."""
    error: float
    """The contender's distance to the wider-dtype truth."""
    peer_error: float
    """PEFT's distance to the same truth."""
    allowed: float
    """What the contender may have."""

    @property
    def passed(self) -> bool:
        """False also for NaN."""
        return self.error <= self.allowed


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the truth for a benchmark in `dtype`."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def gradients(trainable: Iterable[nn.Parameter], save: Callable[[Path], None]) -> dict[str, Group]:
    """Gradients by kind under PEFT's file keys.

    The gradients stand in for the parameters while `save` writes the adapter's file, so that two libraries
    with different parameter names are compared by the names both already promise.
    """
    from safetensors.torch import load_file

    parameters = list(trainable)
    values = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            zero = torch.zeros_like(parameter)
            parameter.data = zero if parameter.grad is None else parameter.grad.detach().clone()
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            tensors = load_file(Path(folder) / "adapter_model.safetensors")
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
            parameter.grad = None
    kinds: dict[str, Group] = {}
    for key, tensor in tensors.items():
        kind = next((k for k in ("lora_A", "lora_B", "lora_magnitude_vector") if k in key), "other")
        kinds.setdefault(f"gradient of {kind}", {})[key] = tensor
    return kinds


def outcome(contender: Contender) -> Outcome:
    """Loss, logits and adapter gradients of one step of a model, without the optimiser."""
    output = contender.forward()
    logits = output.logits.detach()
    targets = contender.ids[:, 1:].reshape(-1)
    token_losses = nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), targets, reduction="none"
    )
    loss = output.loss
    torch.autograd.backward(loss)
    groups = gradients(contender.trainable, contender.save)
    groups["logits"] = {"logits": logits}
    return Outcome(groups=groups, token_losses=token_losses, loss=float(loss.detach()))


def truth(peer: Contender, dtype: torch.dtype) -> Outcome:
    """The outcome of PEFT's code on the same weights in a wider dtype."""
    name = f"{peer.name} in {str(dtype).removeprefix('torch.')}"
    model: Any = copy.deepcopy(peer.model).to(dtype)
    if dtype is torch.float64 and any(p.dim() == 3 for p in model.parameters()):
        model.set_experts_implementation("eager")  # torch's grouped products take no fp64
    return outcome(Contender(name, model, peer.ids))


def compare(reference: Outcome, peer: Outcome, ours: Outcome, dtype: torch.dtype) -> list[Check]:
    """Every quantity of `ours` against `reference`, with `peer` as the yardstick."""
    floor = torch.finfo(dtype).eps / 2
    checks = []
    for quantity, expected in reference.groups.items():
        peer_error = _distance(peer.groups.get(quantity, {}), expected)
        error = _distance(ours.groups.get(quantity, {}), expected)
        allowed = FACTOR * max(peer_error, floor)
        checks.append(Check(quantity=quantity, error=error, peer_error=peer_error, allowed=allowed))
    if reference.loss is not None and ours.loss is not None:
        # The loss is a mean over tokens, so its own difference may vanish by luck. The root mean square of
        # the tokens' differences bounds it and does not.
        assert peer.token_losses is not None
        assert reference.token_losses is not None
        peer_error = float((peer.token_losses - reference.token_losses).square().mean().sqrt())
        error = abs(ours.loss - reference.loss)
        allowed = FACTOR * max(peer_error, torch.finfo(torch.float32).eps * abs(reference.loss))
        checks.append(Check(quantity="loss", error=error, peer_error=peer_error, allowed=allowed))
    return checks


def failure(checks: Iterable[Check]) -> str | None:
    """One line on the worst quantity that failed, or None."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return None
    worst = max(failed, key=lambda check: float("inf") if check.error != check.error else check.error)
    return (
        f"{worst.quantity} is off by {worst.error:.1e} where PEFT is off by {worst.peer_error:.1e} "
        f"and {worst.allowed:.1e} is allowed"
    )


def _distance(actual: Group, expected: Group) -> float:
    """Root mean square over the tensors of their relative error in the 2-norm; infinite if names differ.

    Relative errors are taken tensor by tensor, so that one wrong small tensor is not lost among large ones.
    """
    if actual.keys() != expected.keys():
        return float("inf")
    errors = []
    for name, truth_ in expected.items():
        scale = torch.linalg.vector_norm(truth_.double())
        difference = torch.linalg.vector_norm(actual[name].double() - truth_.double())
        errors.append(float(difference / scale) if scale > 0 else float(difference))
    return math.sqrt(sum(error * error for error in errors) / len(errors))
