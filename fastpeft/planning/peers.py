"""Optimisers of other packages, as references: GaLore (arXiv 2403.03507) and LOMO (arXiv 2306.09782).

GaLore keeps AdamW's moments of ``P^T G`` [r, n] instead of G [m, n], with P the first r left singular vectors
of a gradient (right ones where m >= n), computed anew every so many steps. LOMO is SGD that updates each
parameter within the backward pass, so that no two gradients are there at once.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from fastpeft.errors import ConfigError
from fastpeft.layers.kinds import is_linear_like
from fastpeft.targets import repeated_blocks

# By name, the module and the package that bring it.
PACKAGES = {"galore": ("galore_torch", "galore-torch"), "lomo": ("lomo_optim", "lomo-optim")}
GALORE_RANK = 128  # with the scale below, what the paper's repository and transformers begin with
GALORE_SCALE = 0.25


def missing(name: str) -> str | None:
    """Return why an optimiser's package cannot be imported, or None."""
    module, package = PACKAGES[name]
    try:
        importlib.import_module(module)
    except Exception as error:  # what they import in turn raises more than ImportError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{name} needs the package {package} (pip install {package}): {reason}"
    return None


def galore(model: nn.Module, rank: int = GALORE_RANK, *, lr: float = 1e-3, gap: int = 200) -> Any:
    """Return GaLore's AdamW: low rank for the linears of the blocks that train, AdamW for all else.

    Args:
        model: the module that trains.
        rank: r.
        lr: learning rate.
        gap: steps from one projection to the next.

    Raises:
        ConfigError: the package cannot be imported.
    """
    package = _imported("galore")
    blocks = tuple(f"{path}." for path, _ in repeated_blocks(model))
    linears = {id(m._parameters.get("weight")) for path, m in model.named_modules()
               if path.startswith(blocks) and is_linear_like(m)}  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    low = {"rank": rank, "update_proj_gap": gap, "scale": GALORE_SCALE, "proj_type": "std"}
    groups = [
        {"params": [p for p in trained if id(p) not in linears]},
        {"params": [p for p in trained if id(p) in linears], **low},
    ]
    return package.GaLoreAdamW(groups, lr=lr, no_deprecation_warning=True)


def lomo(model: nn.Module, *, lr: float = 1e-3) -> Any:
    """Return LOMO on what of a model trains: its ``fused_backward(loss, lr)`` is backward and step in one.

    Raises:
        ConfigError: the package cannot be imported.
    """
    return _imported("lomo").Lomo(model, lr=lr)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser updates within the backward pass, and has no step."""
    return hasattr(optimizer, "fused_backward")


def backward(loss: torch.Tensor, optimizer: Any) -> None:
    """Run the backward pass, with the updates in it where the optimiser has them there."""
    if is_fused(optimizer):
        optimizer.fused_backward(loss, optimizer.defaults["lr"])
    else:
        torch.autograd.backward(loss)


def _imported(name: str) -> Any:
    if (reason := missing(name)) is not None:
        raise ConfigError(f"optimizer: {reason}")
    return importlib.import_module(PACKAGES[name][0])
