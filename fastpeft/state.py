"""What a patched model carries along: enough to describe, save and undo the patch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import PatchError
from fastpeft.patch_report import PatchReport

_ATTRIBUTE = "_fastpeft_state"


@dataclass
class PatchState:
    """The record of one patch.

    Attributes:
        configs: the configuration of every adapter, by name, in the order in which they came.
        owner: the adapter that the model was patched with: biases and modules that train whole are its.
        originals: replaced modules by path; a module shared by several paths stands under each.
        requires_grad: the flag of every base Parameter before the patch, by qualified name.
        witness: name and dtype at the patch of a base Parameter that stays in the model, to tell a later cast
            of the whole model.
        trained_values: the values, before training, of base Parameters that train in place (biases), by name.
        saved_modules: paths of the modules that train whole (``modules_to_save``).
        report: what was done to every module.
    """

    configs: dict[str, Any]
    owner: str
    originals: dict[str, nn.Module]
    requires_grad: dict[str, bool]
    witness: tuple[str, torch.dtype]
    trained_values: dict[str, Tensor]
    saved_modules: tuple[str, ...]
    report: PatchReport = field(repr=False)


def find_state(model: nn.Module) -> PatchState | None:
    """Return the record of the model's patch, or None if it is not patched."""
    return model.__dict__.get(_ATTRIBUTE)


def require_state(model: nn.Module, verb: str) -> PatchState:
    """Return the record of the model's patch.

    Raises:
        PatchError: the model is not patched.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"{verb}: expected a torch.nn.Module, got {type(model).__name__}")
    if (state := find_state(model)) is not None:
        return state
    owner = next((path for path, module in model.named_modules() if find_state(module)), None)
    hint = f"; its submodule {owner!r} is, pass that one" if owner else "; call fastpeft.patch(model) first"
    raise PatchError(f"{verb}: this {type(model).__name__} is not patched by fastpeft{hint}")


def store_state(model: nn.Module, state: PatchState | None) -> None:
    """Attach the record to the model, or take it away."""
    if state is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state
