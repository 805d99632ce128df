"""PEFT's own tests: fetched for the installed version, unpacked, run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    """What a run gave of one file."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    routes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def fast_share(self) -> float:
        """Of the calls in which an adapter had something to do, the share that our ops computed."""
        return _share(self.routes["fused"] + self.routes["added"], self.routes["peft"])

    @property
    def own_share(self) -> float:
        """Of all calls, the share that was not left to PEFT: with those that need the base alone."""
        return _share(self.routes.total() - self.routes["peft"], self.routes["peft"])


def _share(ours: int, others: int) -> float:
    return ours / (ours + others) if ours + others else 0.0


def fetch(cache: Path) -> Path:
    """Return the folder with the tests of the PEFT that is installed, fetched from PyPI once."""
    release = f"peft-{version('peft')}"
    folder = cache / release
    tests = folder / "tests"
    if not (tests / "__init__.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / f"{release}.tar.gz"
        if not archive.exists():
            words = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
            command = [
                sys.executable,
                "-m",
                "pip",
                *words,
                "--dest",
                str(folder),
                release.replace("-", "==", 1),
            ]
            subprocess.run(command, check=True)
        tests.mkdir(exist_ok=True)
        with tarfile.open(archive) as files:
            for member in files.getmembers():
                path = Path(member.name)
                # Plain files of one folder alone, under their last name: nothing else can be written.
                if (
                    member.isfile()
                    and path.parts[1:2] == ("tests",)
                    and len(path.parts) == 3
                    and path.suffix == ".py"
                ):
                    content = files.extractfile(member)
                    assert content is not None
                    (tests / path.name).write_bytes(content.read())
        (folder / "pytest.ini").write_text(
            "[pytest]\nmarkers =\n" + "".join(f"    {m}: PEFT's\n" for m in MARKERS)
        )
        (tests / "__init__.py").touch()
    return folder


MARKERS = ("regression", "bitsandbytes", "single_gpu_tests", "multi_gpu_tests", "large_model", "flaky")


def run(
    folder: Path,
    home: Path,
    files: Mapping[str, Sequence[str]],
    *,
    accelerated: bool,
    workers: int = 2,
    log: Path | None = None,
) -> dict[str, Result]:
    """Run ``test_<name>.py`` for every name, all in one pytest, and return what came of each.

    Args:
        folder: PEFT's tests (:func:`fetch`).
        home: the stand-ins for the hub's models, which becomes ``HF_HOME``.
        files: name of a file: parts of the names of its tests that are wanted, none for all.
        accelerated: whether PEFT's layers compute our way.
        workers: processes.
        log: where pytest's whole output goes.

    Raises:
        RuntimeError: pytest did not come to its end.
    """
    counts = folder / "counts"
    counts.mkdir(exist_ok=True)
    for old in counts.glob("*.json"):
        old.unlink()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests" / "conformance", ROOT, ROOT / "kernels"))),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "FASTPEFT_CONFORMANCE": "accelerated" if accelerated else "plain",
        "FASTPEFT_CONFORMANCE_COUNTS": str(counts),
        "FASTPEFT_CONFORMANCE_SELECT": json.dumps({f"test_{name}": list(s) for name, s in files.items()}),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-rfE", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "-p", "peft_plugin", "-n", str(workers) if workers > 1 else "0"]
    paths = [f"tests/test_{name}.py" for name in files]
    done = subprocess.run([*command, *paths], cwd=folder, env=environment, capture_output=True, text=True)
    if log:
        with log.open("a") as file:
            file.write(done.stdout + done.stderr)
    outcomes = counts / "outcomes.json"
    if not outcomes.exists():
        raise RuntimeError(f"pytest did not come to its end:\n{(done.stdout + done.stderr)[-3000:]}")
    results = {name: Result() for name in files}
    for test, (outcome, seconds) in json.loads(outcomes.read_text()).items():
        result = results[test.split(".py::")[0].removeprefix("tests/test_")]
        result.seconds += seconds
        result.passed += outcome == "passed"
        if outcome == "failed":
            result.failed.append(test.removeprefix("tests/"))
    for path in counts.glob("calls-*.json"):
        for file_name, calls in json.loads(path.read_text()).items():
            result = results[file_name.removeprefix("test_")]
            result.routes.update(calls["routes"])
            result.reasons.update(calls["reasons"])
    return results
