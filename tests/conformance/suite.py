"""PEFT's own tests: fetched for the installed version, unpacked, run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
_OUTCOME = re.compile(r"^(FAILED|ERROR) (\S+::.*?)(?: - .*)?$")
_SUMMARY = re.compile(r"(\d+) (passed|failed|error|errors|skipped|xfailed|xpassed|deselected)")


@dataclass
class Result:
    """What a run of one file gave."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    routes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    output: str = ""

    @property
    def fast_share(self) -> float:
        """The share of calls that were not left to PEFT."""
        calls = self.routes.total()
        return 1.0 - self.routes["peft"] / calls if calls else 0.0


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
    folder: Path, home: Path, name: str, *, accelerated: bool, select: str = "", workers: int = 2
) -> Result:
    """Run ``test_<name>.py`` and return what came of it."""
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
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "--tb=line",
        "-rfE",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-p", "peft_plugin", "-n", str(workers), "-W", "ignore"]
    command += ["-k", select] if select else []
    done = subprocess.run(
        [*command, f"tests/test_{name}.py"], cwd=folder, env=environment, capture_output=True, text=True
    )
    result = Result(output=done.stdout + done.stderr)
    for line in done.stdout.splitlines():
        if match := _OUTCOME.match(line):
            result.failed.append(match[2].removeprefix("tests/"))
    for number, what in _SUMMARY.findall(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""):
        if what == "passed":
            result.passed = int(number)
    for file in counts.glob("*.json"):
        content = json.loads(file.read_text())
        result.routes.update(content["routes"])
        result.reasons.update(content["reasons"])
    return result
