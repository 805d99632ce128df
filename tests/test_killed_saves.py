"""Saves that are killed or fail: the folder holds one adapter whole, the old or the new, for PEFT as well."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import fastpeft
from fastpeft import exchange, folder_files
from tests.kill_worker import KINDS, base, make_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def held(folder: Path, by=fastpeft.load) -> int:
    """Which of the worker's adapters the folder holds, wholly, for whom it is read by."""
    kinds = set()
    for layer in by(base(), folder).modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b = (getattr(m["default"], "weight", m["default"]) for m in (layer.lora_A, layer.lora_B))
        kind = next(k for k, (_, _, value) in enumerate(KINDS) if value == a[0, 0].item())
        r, alpha, value = KINDS[kind]
        assert a.shape == (r, 64)
        scaling = layer.specs["default"].scaling if by is fastpeft.load else layer.scaling["default"]
        assert scaling == alpha / r
        assert torch.equal(a, torch.full_like(a, value))
        assert torch.equal(b, torch.full_like(b, value))
        kinds.add(kind)
    assert len(kinds) == 1
    return kinds.pop()


class Saver:
    """The worker's processes, which take turns."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("kill_worker.py")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, str(script)], env=environment, **pipes)
        assert self.answer() == "ready"

    def answer(self) -> str:
        return self.process.stdout.readline().strip()

    def start(self, *what: object) -> int:
        print(*what, file=self.process.stdin, flush=True)
        return int(self.answer())


@pytest.fixture(scope="module")
def saver():
    one = Saver()
    yield one
    one.process.stdin.close()
    assert one.process.wait(10) == 0


def settled(folder: Path, others: set[str]) -> None:
    """The next save finds nothing in its way and leaves nothing behind."""
    fastpeft.save(make_model(1), folder)
    assert held(folder) == held(folder, PeftModel.from_pretrained) == 1
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS, *others}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("kind", "other"),
    [(2, None), (1, None), (1, "notes.txt"), (1, "checkpoint/notes.txt")],
    ids=["same-config", "other-config", "other-config-and-files", "other-config-and-folders"],
)
def test_a_save_that_is_killed_before_any_of_its_file_operations(saver, tmp_path, kind, other):
    folder, seen = tmp_path / "here" / "adapter", set()
    for operation in range(200):
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        fastpeft.save(make_model(0), folder)
        if other:
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_text("kept")
        saver.start(folder, kind, operation)
        end = saver.answer()
        seen.add(now := held(folder))
        if other and "/" in other and not (folder / CONFIG).exists():
            # The kernel exchanges no folders here. So PEFT refuses, and sees no mixture.
            seen.add("refused")
            with pytest.raises(ValueError, match=f"Can't find '{CONFIG}'"):
                PeftModel.from_pretrained(base(), folder)
        else:
            assert held(folder, PeftModel.from_pretrained) == now
        settled(folder, {other.partition("/")[0]} if other else set())
        assert other is None or (folder / other).read_text() == "kept"
        if end == "done":
            break
    assert now == kind
    assert 10 < operation < 199
    assert seen == {0, kind} | ({"refused"} if other and "/" in other else set())


def test_saves_that_are_killed_at_random_moments(saver, tmp_path):
    folder, generator, seen = tmp_path / "here" / "adapter", random.Random(0), set()
    fastpeft.save(make_model(0), folder)
    kills, longest = 0, 0.03
    while kills < 40 or seen != {0, 1, 2}:
        kills += 1
        if kills % 40 == 0:
            longest *= 2  # a busy machine saves less in that time
        assert kills < 400, f"only {seen} were ever saved"
        process = saver.start(folder, "loop")
        time.sleep(generator.random() * longest)
        os.kill(process, signal.SIGKILL)
        assert saver.answer() == "killed"
        seen.add(now := held(folder))
        assert held(folder, PeftModel.from_pretrained) == now
    settled(folder, set())


@pytest.mark.parametrize("kind", [1, 2], ids=["other-config", "same-config"])
@pytest.mark.parametrize(
    ("stage", "held_then"),
    [("save_file", 0), ("flush", 0), ("old-config", 0), ("weights", 0), ("new-config", 1)],
)
def test_a_save_that_fails_anywhere_leaves_one_adapter_whole(tmp_path, monkeypatch, kind, stage, held_then):
    folder = fastpeft.save(make_model(0), tmp_path / "adapter")
    (folder / "notes").mkdir()  # so that no folders are exchanged

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if stage in ("save_file", "flush"):
        monkeypatch.setattr(folder_files, stage, fail)
    else:
        replace = Path.replace
        fails = {
            "old-config": lambda p: p == folder / CONFIG,
            "weights": lambda p: p.name == WEIGHTS,
            "new-config": lambda p: p.name == CONFIG and p.parent != folder,
        }[stage]
        monkeypatch.setattr(Path, "replace", lambda p, to: fail() if fails(p) else replace(p, to))
    if kind == 2 and stage.endswith("config"):
        assert fastpeft.save(make_model(kind), folder) == folder  # it does not touch the configuration
        return
    with pytest.raises(fastpeft.CheckpointError, match="No space left"):
        fastpeft.save(make_model(kind), folder)
    assert held(folder) == held_then
    monkeypatch.undo()
    assert held(folder) == held_then
    (folder / "notes").rmdir()
    settled(folder, set())


def test_what_comes_into_the_folder_during_an_exchange_is_kept(tmp_path, monkeypatch):
    folder = fastpeft.save(make_model(0), tmp_path / "here" / "adapter")
    (folder / "log").write_text("old")
    folder.chmod(0o750)
    copystat = shutil.copystat

    def write_then_copy(*paths):
        (folder / "late").write_text("late")
        (folder / "log").unlink()
        (folder / "log").write_text("new")
        copystat(*paths)

    monkeypatch.setattr(shutil, "copystat", write_then_copy)
    before = folder.stat()
    fastpeft.save(make_model(1), folder)
    assert folder.stat().st_ino != before.st_ino, "exchanged"
    assert folder.stat().st_mode == before.st_mode
    assert ((folder / "late").read_text(), (folder / "log").read_text()) == ("late", "new")
    settled(folder, {"late", "log"})


def test_a_working_folder_stays_the_same_folder(tmp_path, monkeypatch):
    folder = fastpeft.save(make_model(0), tmp_path / "here" / "adapter")
    monkeypatch.chdir(folder)
    before = folder.stat().st_ino
    fastpeft.save(make_model(1), ".")
    assert folder.stat().st_ino == before
    assert held(Path()) == 1
    settled(folder, set())


def test_without_the_kernels_call_it_is_renames(tmp_path, monkeypatch):
    folder = fastpeft.save(make_model(0), tmp_path / "here" / "adapter")
    monkeypatch.setattr(exchange, "_exchange", lambda: lambda a, b: False)
    (folder / "log").write_text("kept")
    before = folder.stat().st_ino
    fastpeft.save(make_model(1), folder)
    assert folder.stat().st_ino == before
    settled(folder, {"log"})
