"""Measure an intrinsic dimension that is known: Li et al.'s toy problem (arXiv 1804.08838).

1000 parameters in 10 groups of 100; the loss asks that the first group sums to 1, the second to 2 and so on.
The solutions fill 990 dimensions, so the intrinsic dimension is 10: a random subspace of 10 or more meets
them, one of fewer does not. The score is ``exp(-loss)``, 1 where the loss is 0.

    python examples/intrinsic_dimension.py --projection fastfood --seeds 3 --out runs/intrinsic
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft import intrinsic

SIZE, GROUPS = 1000, 10
LADDER = (1, 2, 4, 6, 8, 9, 10, 11, 12, 16, 32)


class Toy(nn.Module):
    """1000 numbers, and how far the sums of their tenths are from 1 to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))

    def forward(self) -> Tensor:
        """Return the loss: the mean square of the sums' differences from what they should be."""
        sums = self.theta.view(GROUPS, -1).sum(1)
        return (sums - torch.arange(1, GROUPS + 1, dtype=torch.float64)).square().mean()


def train(model: nn.Module) -> None:
    """A quadratic of few dimensions: L-BFGS ends at its minimum."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(
        trained, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    """Return ``exp(-loss)``."""
    return math.exp(-model().item())


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--projection", choices=["fastfood", "hashed"], default="fastfood")
    parser.add_argument("--seeds", type=int, default=3, help="projections for each d")
    parser.add_argument("--out", type=Path, default=Path("runs/intrinsic"), help="where the plot goes")
    options = parser.parse_args(arguments)
    found = intrinsic.measure(
        Toy,
        train,
        evaluate,
        LADDER,
        seeds=range(options.seeds),
        projection=options.projection,
        progress=lambda p: print(
            f"{'full' if p.d is None else f'd={p.d}, seed {p.seed}'}: {p.score:.6f} ({p.seconds:.2f} s)",
            flush=True,
        ),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    print(found)
    print(f"plot: {found.plot(options.out / 'intrinsic_dimension.png')}")


if __name__ == "__main__":
    main()
