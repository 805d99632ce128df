"""The MLPs of a model's blocks, found by the shapes of their linears, for any class.

An MLP is a module whose own linears lead from the block's width to another and, the last of them, back: wide
``up`` (one, two for a gated MLP, or one that is both) and ``down``; or a module that holds experts. Where a
block holds such linears apart from one another (OPT's in the block itself, BERT's in two modules), there is
no module for the whole, or where it adds the residual by itself (Bloom's), ``down`` stands for its output.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastpeft.layers.kinds import is_linear_like, shape_of
from fastpeft.targets import repeated_blocks


@dataclass(frozen=True)
class MLP:
    """One MLP.

    Attributes:
        path: of the module that returns its output.
        is_whole: whether that module is the MLP, not its last linear.
    """

    path: str
    is_whole: bool


def find_mlps(model: nn.Module) -> Iterator[MLP]:
    """Yield the MLPs of the repeated blocks, in the model's order."""
    for path, _ in repeated_blocks(model):
        block = model.get_submodule(path)
        mixtures = list(dict.fromkeys(_mixtures(block)))
        whole = [name for name, module in block.named_modules() if _leads_back(module)]
        whole = [n for n in whole if not any(n.startswith(f"{mixture}.") for mixture in mixtures)]
        # Where it is the block itself, or takes the residual too (Bloom's), it returns more than the MLP's.
        apart = "" in whole or not all(_takes_one(block.get_submodule(name)) for name in whole)
        if mixtures or (whole and not apart):
            yield from (MLP(f"{path}.{name}", True) for name in [*mixtures, *whole])
        else:
            yield from (MLP(f"{path}.{name}", False) for name in _last_linears(block))


def width_of(block: nn.Module) -> int | None:
    """Return the features between a block's parts: those that most of its linears take or return."""
    counts = Counter(n for m in block.modules() if is_linear_like(m) for n in shape_of(m))
    return max(counts, key=lambda n: counts[n]) if counts else None


def _leads_back(module: nn.Module) -> bool:
    shapes = [shape_of(child) for child in module.children() if is_linear_like(child)]
    if len(shapes) not in (2, 3):
        return False
    for place, (inside, outside) in enumerate(shapes):
        ups = shapes[:place] + shapes[place + 1 :]
        # A gate and an up in one weight lead to twice the width.
        if inside != outside and all(up in ((outside, inside), (outside, 2 * inside)) for up in ups):
            return True
    return False


def _takes_one(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 1


def _mixtures(block: nn.Module) -> Iterator[str]:
    """Yield the names of modules that hold experts: 3-D weights, or a list of MLPs."""
    for name, module in block.named_modules():
        own = [] if isinstance(module, _ConvNd) else module.parameters(recurse=False)
        stacked = any(parameter.dim() == 3 for parameter in own)
        listed = isinstance(module, nn.ModuleList) and len(module) > 1 and all(map(_leads_back, module))
        if (stacked or listed) and (holder := name.rpartition(".")[0]):
            yield holder


def _last_linears(block: nn.Module) -> Iterator[str]:
    linears = [(name, shape_of(module)) for name, module in block.named_modules() if is_linear_like(module)]
    for (_, up), (name, down) in itertools.pairwise(linears):
        if up == (down[1], down[0]) and up[0] < up[1]:
            yield name
