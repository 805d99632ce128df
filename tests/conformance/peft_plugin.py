"""pytest plugin for a run of PEFT's own tests: LoRA's cases alone, offline, and accelerated where asked for.

Environment: ``FASTPEFT_CONFORMANCE=accelerated`` patches every model in which PEFT makes LoRA layers;
``FASTPEFT_CONFORMANCE_COUNTS`` is a folder for ``outcomes.json`` (test: outcome, seconds) and for each
process's counts of calls by file, way and reason; ``FASTPEFT_CONFORMANCE_SELECT`` maps a file's name to parts
of test names, of which a test must have one where there are any.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


class EveryModel(dict[str, int]):
    """Tells PEFT's tests that each model was downloaded before, so that they go offline for it."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def pytest_configure(config: pytest.Config) -> None:
    """Cut the network off, and accelerate, in the processes that run tests."""
    _offline()
    hands_out = bool(getattr(config.option, "numprocesses", 0)) and not hasattr(config, "workerinput")
    if os.environ.get("FASTPEFT_CONFORMANCE") == "accelerated" and not hands_out:
        _accelerate()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of other tuners, and what was not asked for."""
    wanted = json.loads(os.environ.get("FASTPEFT_CONFORMANCE_SELECT", "{}"))
    kept = [item for item in items if _is_lora(item) and _is_wanted(item, wanted.get(item.path.stem, []))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Iterator[None]:
    """Before PEFT's helpers are used: no model of theirs needs the hub."""
    yield
    import sys

    helpers = sys.modules.get("tests.testing_utils")
    if helpers is not None and not isinstance(helpers._HUB_MODEL_ACCESSES, EveryModel):
        helpers._HUB_MODEL_ACCESSES = EveryModel()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """As above, for modules that were imported since."""
    for _ in pytest_pycollect_makemodule(item.path, None):
        pass


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Put a test's calls to its file's account."""
    if _calls is not None:
        routes, reasons = _by_file[item.path.stem]
        routes.update(_calls.routes)
        reasons.update(_calls.reasons)
        _calls.routes.clear()
        _calls.reasons.clear()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what came of a test; an error before or after it is a failure."""
    outcome, seconds = _outcomes.get(report.nodeid, ("skipped", 0.0))
    if report.failed or outcome == "failed":
        outcome = "failed"
    elif report.when == "call" and report.passed:
        outcome = "passed"
    _outcomes[report.nodeid] = (outcome, seconds + report.duration)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write this process's counts, and every test's outcome where all of them are known."""
    folder = os.environ.get("FASTPEFT_CONFORMANCE_COUNTS")
    if not folder:
        return
    calls = {name: {"routes": routes, "reasons": reasons} for name, (routes, reasons) in _by_file.items()}
    Path(folder, f"calls-{os.getpid()}.json").write_text(json.dumps(calls))
    if not hasattr(session.config, "workerinput"):
        Path(folder, "outcomes.json").write_text(json.dumps(_outcomes))


_calls: Any = None
_by_file: defaultdict[str, tuple[Counter[str], Counter[str]]] = defaultdict(lambda: (Counter(), Counter()))
_outcomes: dict[str, tuple[str, float]] = {}


def _accelerate() -> None:
    """Put our forward on every LoRA layer that PEFT makes, in any model."""
    global _calls
    from peft.tuners.tuners_utils import BaseTuner

    from fastpeft.blocks.install import fuse_blocks
    from fastpeft.in_place.install import accelerate_layers
    from fastpeft.in_place.record import Calls

    _calls = Calls()
    original = BaseTuner.inject_adapter

    @functools.wraps(original)
    def inject_adapter(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, model, *args, **kwargs)
        accelerate_layers(model, _calls)
        fuse_blocks(model)
        return result

    BaseTuner.inject_adapter = inject_adapter


def _offline() -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network in a conformance run")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.create_connection = refuse
    socket.getaddrinfo = refuse
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the hub's client waits between its attempts


def _is_lora(item: pytest.Item) -> bool:
    """Whether a case is LoRA's, or not one of a tuner's at all."""
    from peft import LoraConfig, PeftConfig

    parameters = getattr(getattr(item, "callspec", None), "params", {})
    kinds = [v for v in _flat(parameters.values()) if isinstance(v, type) and issubclass(v, PeftConfig)]
    return all(kind is LoraConfig for kind in kinds)


def _is_wanted(item: pytest.Item, parts: Sequence[str]) -> bool:
    return not parts or any(part in item.nodeid for part in parts)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
