"""How far training moved a weight in magnitude and in direction (DoRA, arXiv 2402.09353, section 3.2).

    W = m V / ||V||_c        dM = mean_n |m_n' - m_n|        dD = mean_n (1 - cos(v_n', v_n))

over the vectors n of a weight: the paper writes W [d, k] with h = W x, and n for one of k columns (an input
feature), while its code and every library keep DoRA's magnitude by row (an output feature). ``per`` says
which: ``"column"`` as in the paper's section, ``"row"`` as in the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastpeft.errors import ConfigError
from fastpeft.instruments.effective import AdaptedWeight, adapted_weights
from fastpeft.layers.kinds import is_conv1d_like, is_linear_like
from fastpeft.layers.subclass import numbers_of
from fastpeft.targets import matches, repeated_blocks

Per = Literal["column", "row"]
Names = Sequence[str] | str | None
Rows = Callable[[int, int], Tensor]  # rows from one to before another, [rows, in_features]
_BLOCK = 2**20  # elements that are in fp64 at a time


@dataclass(frozen=True)
class Change:
    """What became of one weight.

    Attributes:
        path: of its module; in files, its name without ``.weight``.
        layer: the first number in the path: the block's index; None outside the blocks.
        kind: the last part of the path, ``"q_proj"`` and the like.
        magnitude: dM.
        direction: dD, from 0 (the same) to 2 (the opposite).
    """

    path: str
    layer: int | None
    kind: str
    magnitude: float
    direction: float


def changes_between(
    before: nn.Module, after: nn.Module, *, names: Names = None, per: Per = "column"
) -> list[Change]:
    """Return the change of every linear inside the blocks from one model to another.

    Args:
        before: plain or patched; adapters count as what they amount to.
        after: with linears at the same paths.
        names: names or dotted suffixes of linears, or one regular expression; default: all in the blocks.
        per: ``"column"`` or ``"row"``.

    Raises:
        ConfigError: the models' linears differ in name or shape, or nothing is meant.
    """
    check(per)
    first, second = dict(_weights(before, names)), dict(_weights(after, names))
    compare_names(first, second, names)
    return [made(path, first[path](), second[path](), per) for path in first]


def changes_of(model: nn.Module, *, names: Names = None, per: Per = "column") -> list[Change]:
    """Return the change that a model's adapters make to every linear that has one.

    Args:
        model: patched by fastpeft, or PEFT's with LoRA. With merged adapters, what they changed; with PiSSA
            or OLoRA, from the base as it was before the patch.
        names: as for :func:`changes_between`.
        per: likewise.

    Raises:
        ConfigError: the model has no such adapter, or its weight before is gone.
    """
    check(per)
    found = [
        made(path, weight.before(), weight.effective(), per)
        for path, weight in adapted_weights(model)
        if names is None or matches(_selector(names), path)
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no adapter in a linear{_named(names)}")
    return found


def correlation(changes: Sequence[Change]) -> float:
    """Return Pearson's correlation of dM and dD, of which figure 2 has one for each method.

    Raises:
        ConfigError: there are fewer than two changes, or all are the same in one of the two.
    """
    n = max(1, len(changes))
    mean_m = sum(c.magnitude for c in changes) / n
    mean_d = sum(c.direction for c in changes) / n
    mm = sum((c.magnitude - mean_m) ** 2 for c in changes)
    dd = sum((c.direction - mean_d) ** 2 for c in changes)
    if len(changes) < 2 or mm <= 0.0 or dd <= 0.0:
        raise ConfigError(f"correlation: expected changes of different sizes, got {len(changes)}")
    return sum((c.magnitude - mean_m) * (c.direction - mean_d) for c in changes) / math.sqrt(mm * dd)


def made(path: str, before: Tensor, after: Tensor, per: Per) -> Change:
    """Return the change of one weight, [out_features, in_features] before and after."""
    if before.shape != after.shape or before.dim() != 2:
        raise ConfigError(
            f"{path}: expected two weights [out_features, in_features] of one shape, got "
            f"{list(before.shape)} and {list(after.shape)}"
        )
    rows, columns = before.shape
    return change(path, (rows, columns), lambda a, b: before[a:b], lambda a, b: after[a:b], per)


@torch.no_grad()
def change(path: str, shape: tuple[int, int], before: Rows, after: Rows, per: Per) -> Change:
    """Return the change of one weight that is read a few rows at a time, in fp64.

    A vector of zeros has no direction: it is the same as another such, and at right angles to any other.
    """
    n_rows, n_columns = shape
    step = max(1, _BLOCK // max(n_columns, 1))
    sums: list[Tensor] = []  # ||a||^2, ||b||^2 and <a, b> of each vector
    for start in range(0, n_rows, step):
        a, b = (read(start, min(start + step, n_rows)).double() for read in (before, after))
        dim = 0 if per == "column" else 1
        part = torch.stack([(a * a).sum(dim), (b * b).sum(dim), (a * b).sum(dim)])
        if per == "row" or not sums:
            sums.append(part)
        else:
            sums[0] += part.to(sums[0].device)
    aa, bb, ab = torch.cat(sums, dim=1)
    if not torch.isfinite(aa + bb).all():
        raise ConfigError(f"{path}: expected finite weights")
    magnitude = (bb.sqrt() - aa.sqrt()).abs().mean()
    lengths = (aa * bb).sqrt()
    cosine = torch.where(lengths > 0, ab / lengths, ((aa == 0) & (bb == 0)).double())
    direction = (1 - cosine.clamp(-1.0, 1.0)).mean()
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    kind = path.rpartition(".")[2]
    return Change(path, numbers[0] if numbers else None, kind, float(magnitude), float(direction))


def check(per: Any) -> None:
    """Raise a ConfigError unless ``per`` is one of the two."""
    if per not in get_args(Per):
        raise ConfigError(f"per: expected one of {', '.join(get_args(Per))}, got {per!r}")


def compare_names(first: Any, second: Any, names: Names) -> None:
    """Raise a ConfigError unless two sets of weights have the same names, and any."""
    if not first and not second:
        raise ConfigError(f"there is no weight to compare{_named(names)}")
    only = [(path, "before") for path in first if path not in second]
    only += [(path, "after") for path in second if path not in first]
    if only:
        path, where = only[0]
        raise ConfigError(f"expected the same weights before and after, {path!r} is only in the one {where}")


def _weights(model: nn.Module, names: Names) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Path, and what returns the weight, of the linears that are meant."""
    adapted: dict[str, AdaptedWeight] = dict(adapted_weights(model))
    blocks = tuple(f"{path}." for path, _ in repeated_blocks(model))
    inside = tuple(f"{path}." for path in adapted)  # a layer of PEFT's has its base, a linear, in it
    for path, module in model.named_modules():
        if not (path.startswith(blocks) if names is None else matches(_selector(names), path)):
            continue
        if path in adapted:
            yield path, adapted[path].effective
        elif is_linear_like(module) and not path.startswith(inside):
            yield path, partial(_numbers, module)


def _numbers(module: Any) -> Tensor:
    """A linear's weight [out_features, in_features]."""
    weight: Tensor = module.weight.t() if is_conv1d_like(module) else numbers_of(module)
    return weight.detach()


def _selector(names: Names) -> Names:
    return names if names is None or isinstance(names, str) else tuple(names)


def _named(names: Names) -> str:
    return "" if names is None else f" that is named {names!r}"
