"""A part of PEFT's own LoRA tests, on accelerated models; `python -m tests.conformance` runs them all."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.conformance import suite
from tests.conformance.__main__ import Expected as Reach
from tests.conformance.__main__ import main, shortfalls

# Without PEFT's source distribution nothing is tested: that is a failure, unless somebody says so beforehand.
SKIP = "FASTPEFT_SKIP_CONFORMANCE"


def test_pefts_own_tests_pass_and_go_our_way(capsys):
    if os.environ.get(SKIP) == "1":
        pytest.skip(f"{SKIP}=1")
    try:
        suite.fetch(suite.ROOT / ".cache" / "conformance")
    except subprocess.CalledProcessError as error:
        pytest.fail(f"PEFT's source distribution cannot be had here ({SKIP}=1 skips this test): {error}")
    assert main(["--quick", "--workers", "1"]) == 0, capsys.readouterr().out


def test_a_source_distribution_that_cannot_be_had_is_a_failure(monkeypatch, capsys):
    def unreachable(cache):
        raise subprocess.CalledProcessError(1, ["pip", "download"])

    monkeypatch.delenv(SKIP, raising=False)
    monkeypatch.setattr(suite, "fetch", unreachable)
    with pytest.raises(pytest.fail.Exception, match=f"cannot be had here .{SKIP}=1 skips"):
        test_pefts_own_tests_pass_and_go_our_way(capsys)
    monkeypatch.setenv(SKIP, "1")
    with pytest.raises(pytest.skip.Exception):
        test_pefts_own_tests_pass_and_go_our_way(capsys)


def result(passed=10, failed=(), **routes):
    found = suite.Result(passed=passed, failed=list(failed))
    found.routes.update(routes)
    return found


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (result(fused=80, added=10, base=900, peft=10), None),
        (result(fused=50, base=900, peft=20), "71.4% of calls with an adapter fast, expected 80%"),
        (result(fused=50, base=0, peft=25), "66.7% of calls not left to PEFT, expected 70%"),
        (result(passed=9, fused=10), "9 tests passed, expected at least 10"),
        (result(failed=["test_x.py::test_new"], fused=10), "fails only with us: test_x.py::test_new"),
        (result(failed=["test_x.py::test_old"], fused=10), None),
        (result(passed=0, fused=10), "nothing passed"),
    ],
)
def test_what_a_run_must_reach(found, said):
    """Calls that need the base alone are no evidence of speed: they count in one of the two shares only."""
    said_now = list(shortfalls({"x": found}, {"x": Reach(10, 0.8, 0.7)}, {"test_x.py::test_old"}))
    assert any(said in line for line in said_now) if said else not said_now, said_now
