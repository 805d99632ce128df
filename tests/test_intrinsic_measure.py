"""How an intrinsic dimension is measured: on the example's toy problem, whose own is known."""

from __future__ import annotations

import importlib
import math

import pytest

import fastpeft
from fastpeft import intrinsic
from tests.ops.projections import KINDS
from tests.test_example import examples_on_path  # noqa: F401  (fixture)


@pytest.fixture(scope="module")
def toy():
    """The example's toy problem, whose intrinsic dimension is known."""
    return importlib.import_module("intrinsic_dimension")


@pytest.mark.parametrize("kind", KINDS)
def test_ten_dimensions_solve_ten_constraints_and_nine_do_not(kind, tmp_path, toy):
    seen = []
    found = intrinsic.measure(
        toy.Toy,
        toy.train,
        toy.evaluate,
        (4, 8, 9, 10, 11, 16),
        seeds=(0, 1, 2),
        projection=kind,
        progress=seen.append,
    )
    assert found.full == pytest.approx(1.0)
    assert found.threshold == pytest.approx(0.9)
    assert found.d90 == 10
    assert all(found.scores[d] == pytest.approx(1.0, abs=1e-6) for d in (10, 11, 16))
    assert all(found.scores[d] < 0.9 for d in (4, 8, 9))
    assert len(seen) == len(found.points) == 1 + 6 * 3
    assert found.plot(tmp_path / "d90.png").stat().st_size > 5000
    assert "d90 = 10" in str(found)
    short = intrinsic.measure(
        toy.Toy, toy.train, toy.evaluate, (9, 10, 11), full=1.0, stop_when_reached=True, projection=kind
    )
    assert list(short.scores) == [9, 10]
    none = intrinsic.measure(toy.Toy, toy.train, toy.evaluate, [2], full=1.0, projection=kind)
    assert none.d90 is None
    assert "none of these" in str(none)


def test_a_threshold_above_chance(toy):
    scores = iter([0.9, 0.85, 0.87])
    found = intrinsic.measure(toy.Toy, lambda m: None, lambda m: next(scores), [1, 2], floor=0.5)
    assert found.threshold == pytest.approx(0.86)
    assert found.d90 == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ladder": []}, "expected at least one of each"),
        ({"ladder": [0]}, "ladder: expected a whole number of at least 1, got 0"),
        ({"ladder": [1], "fraction": 0.0}, r"fraction: expected a number in \(0, 1\]"),
        ({"ladder": [1], "projection": "dense"}, "projection: expected 'fastfood'"),
        ({"ladder": [1], "seeds": ()}, "expected at least one of each"),
    ],
)
def test_bad_measurements(options, said, toy):
    with pytest.raises(fastpeft.ConfigError, match=said):
        intrinsic.measure(toy.Toy, toy.train, toy.evaluate, **options)
    with pytest.raises(fastpeft.ConfigError, match="expected a finite score, got nan after full training"):
        intrinsic.measure(toy.Toy, toy.train, lambda m: math.nan, [1])


def test_the_example_prints_and_draws(tmp_path, capsys, toy):
    toy.main(["--seeds", "1", "--projection", "hashed", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "d90 = 10" in printed
    assert (tmp_path / "intrinsic_dimension.png").exists()
