"""Measured choices with a fake timer: when they are made, kept, read back and pinned; bad files."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import timeit
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import fastpeft
from fastpeft import choice, choice_file
from fastpeft.choice import ChoiceKey, Chooser, choice_key
from fastpeft.choice_file import ChoiceFile
from tests.models import llama

KEY = choice_key(1000, 4096, 4096, 16, torch.bfloat16)
GPU = torch.device("cuda", 0)
CANDIDATES = {"split": lambda: "a", "aten": lambda: "b", "single": lambda: "c"}
TIMES = {"split": 2.5, "aten": 2.0, "single": 4.0}


class FakeTimer:
    def __init__(self, times=TIMES):
        self.times = times
        self.calls = 0

    def __call__(self, candidates, device):
        self.calls += 1
        return {name: self.times[name] for name in candidates if name in self.times}


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch, tmp_path):
    """A GPU as far as choices go: nothing of torch.cuda is called."""
    monkeypatch.setattr(choice, "can_measure", lambda device: device.type == "cuda")
    monkeypatch.setattr(choice, "device_name", lambda device: f"Fake {device.index}")
    monkeypatch.setenv(choice_file.FOLDER_VARIABLE, str(tmp_path / "cache"))


def ask(chooser: Chooser, candidates=CANDIDATES, key: ChoiceKey = KEY, device: torch.device = GPU) -> str:
    return chooser.choose("lora_forward", candidates, key=key, device=device)


def the_file():
    (path,) = choice_file.cache_folder().iterdir()
    return path


# --- when


def test_buckets():
    assert [choice_key(m, 8, 8, 1, torch.float32).M for m in (0, 1, 2, 3, 1024, 1025)] == [
        1,
        1,
        2,
        4,
        1024,
        2048,
    ]
    assert [choice_key(1, 8, 8, r, torch.float32).r for r in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
    assert str(KEY) == "M<=1024 N=4096 K=4096 r<=16 bf16"
    assert str(choice_key(5, 7, 9, 20, torch.float64)) == "M<=8 N=7 K=9 r<=32 float64"


def test_one_measurement_for_each_op_bucket_device_and_set_of_candidates():
    chooser = Chooser("auto", timer := FakeTimer())
    for tokens in (1000, 1000, 513):
        assert ask(chooser, key=choice_key(tokens, 4096, 4096, 16, torch.bfloat16)) == "aten"
    assert timer.calls == 1
    other = [
        {"key": choice_key(512, 4096, 4096, 16, torch.bfloat16)},
        {"key": choice_key(1000, 4096, 4096, 16, torch.float16)},
        {"key": choice_key(1000, 4096, 4096, 32, torch.bfloat16)},
        {"key": choice_key(1000, 4095, 4096, 16, torch.bfloat16)},
        {"device": torch.device("cuda", 1)},
        {"candidates": {name: CANDIDATES[name] for name in ("single", "split")}},
    ]
    for calls, changed in enumerate(other, start=2):
        assert ask(chooser, **changed) == ("split" if "candidates" in changed else "aten")
        assert timer.calls == calls


@pytest.mark.parametrize("mode", ["auto", "off", "aten", "split", "single"])
def test_modes(mode):
    chooser = Chooser(mode, timer := FakeTimer())
    assert ask(chooser) == {"auto": "aten", "off": "split"}.get(mode, mode)
    assert timer.calls == (mode == "auto")
    few = {name: CANDIDATES[name] for name in ("split", "aten")}  # what an op does not offer is not taken
    assert ask(chooser, few) == ("aten" if mode in ("auto", "aten") else "split")
    assert bool(list(chooser.made())) == (mode == "auto")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fast", "expected one of auto, off, aten, split, single, tma, layers, decode, got 'fast'"),
        ("", "got ''"),
    ],
)
def test_an_unknown_mode_is_refused(name, said):
    with pytest.raises(fastpeft.ConfigError, match=f"FASTPEFT_CHOICE: .*{said}"):
        choice.validated_mode(name)


IN_A_PROCESS = """
import torch
from fastpeft import choice

def timer(candidates, device):
    print("measured", end=" ")
    return {"split": 2.5, "aten": 2.0, "single": 4.0}

choice.can_measure = lambda device: True
choice.device_name = lambda device: "Fake"
choice.CHOOSER.timer, choice.CHOOSER.file = timer, None
key = choice.choice_key(1000, 4096, 4096, 16, torch.bfloat16)
for names in (("split", "aten", "single"), ("split", "aten")):
    candidates = {name: lambda: None for name in names}
    print(choice.choose("lora_forward", candidates, key=key, device=torch.device("cuda", 0)), end=" ")
"""


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (None, "measured aten measured aten"),
        ("auto", "measured aten measured aten"),
        ("off", "split split"),
        ("aten", "aten aten"),
        ("single", "single split"),  # the second op does not offer it
        ("fast", "FASTPEFT_CHOICE: expected one of auto, off, aten,"),
    ],
)
def test_the_environment_reaches_the_process(setting, said):
    environment = {k: v for k, v in os.environ.items() if k != choice.ENVIRONMENT_VARIABLE}
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "kernels")))
    if setting is not None:
        environment[choice.ENVIRONMENT_VARIABLE] = setting
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS], env=environment, capture_output=True, text=True, check=False
    )
    assert said in done.stdout + done.stderr
    assert (done.returncode == 0) == (setting != "fast"), done.stderr


def test_off_a_gpu_the_default_runs():
    chooser = Chooser("auto", timer := FakeTimer(), ChoiceFile())
    assert ask(chooser, device=torch.device("cpu")) == "split"
    assert ask(chooser, {"single": CANDIDATES["single"]}) == "single"
    assert timer.calls == 0
    assert not choice_file.cache_folder().exists()


def test_while_capturing_or_compiling_the_default_runs_and_is_not_remembered(monkeypatch):
    chooser = Chooser("auto", timer := FakeTimer())
    with monkeypatch.context() as patch:
        patch.setattr(choice, "is_capturing", lambda: True)
        assert ask(chooser) == "split"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert ask(chooser) == "split"
        assert ask(Chooser("single", timer)) == "single"
    assert timer.calls == 0
    assert ask(chooser) == "aten"
    monkeypatch.setattr(choice, "is_capturing", lambda: True)
    assert ask(chooser) == "aten"  # known by then


def test_a_traced_function_may_choose():
    chooser = Chooser("auto", FakeTimer())
    compiled = torch.compile(lambda x: x * len(ask(chooser)), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == len("split")


def test_only_candidates_that_run_are_taken():
    assert ask(Chooser("auto", FakeTimer({"split": 3.0, "single": 2.0}))) == "single"
    chooser = Chooser("auto", FakeTimer({}), ChoiceFile())
    assert ask(chooser) == "split"
    assert not list(chooser.made())
    assert not choice_file.cache_folder().exists()


def test_a_candidate_may_choose_and_threads_measure_once():
    chooser = Chooser("auto")
    calls = []

    def timer(candidates, device):
        calls.append(len(candidates))
        if len(candidates) == 3:
            ask(chooser, {name: CANDIDATES[name] for name in ("split", "aten")})
        return {name: TIMES[name] for name in candidates}

    chooser.timer = timer
    winners: list[str] = []
    threads = [threading.Thread(target=lambda: winners.append(ask(chooser)), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert winners == ["aten"] * 4
    assert calls == [3, 2]


def test_a_known_choice_costs_less_than_2_microseconds():
    chooser = Chooser("auto", FakeTimer())
    ask(chooser)
    best = min(
        timeit.repeat(lambda: chooser.choose("lora_forward", CANDIDATES, key=KEY, device=GPU), number=2000)
    )
    assert best / 2000 < 2e-6


class FakeEvent:
    """An event of a clock that candidates advance."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


def test_the_timer_takes_the_best_round_and_leaves_out_what_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    choice._warn_once.cache_clear()
    counts = {"split": 0, "aten": 0}

    def candidate(name, cost, first):
        def run():
            counts[name] += 1
            slow = counts[name] <= 2 + choice.RUNS  # compilation, and a disturbed first round
            FakeEvent.now += first if slow else cost

        return run

    def failing():
        raise torch.OutOfMemoryError("too little memory")

    candidates = {
        "split": candidate("split", 2.0, 90.0),
        "single": failing,
        "aten": candidate("aten", 3.0, 1.5),
    }
    with pytest.warns(RuntimeWarning, match="'single' cannot run here .*too little memory"):
        times = choice.cuda_times(candidates, GPU)
    assert times == {"split": 2.0, "aten": 1.5}
    assert set(counts.values()) == {2 + choice.ROUNDS * choice.RUNS}


# --- the file


def test_another_process_finds_the_times(monkeypatch):
    ask(Chooser("auto", FakeTimer(), ChoiceFile()))
    contents = json.loads(the_file().read_text())
    assert contents["entries"] == {"lora_forward | Fake 0 | M<=1024 N=4096 K=4096 r<=16 bf16": TIMES}
    chooser = Chooser("auto", timer := FakeTimer(), ChoiceFile())
    assert ask(chooser) == "aten"
    assert timer.calls == 0
    assert list(chooser.made()) == [
        "lora_forward M<=1024 N=4096 K=4096 r<=16 bf16: aten (1.00), split 1.25, single 2.00"
    ]
    assert ask(chooser, {**CANDIDATES, "fourth": CANDIDATES["aten"]}) == "aten"
    assert timer.calls == 1  # the file lacks the fourth, so all are measured
    monkeypatch.setattr(choice, "device_name", lambda device: "Another")
    assert ask(Chooser("auto", timer, ChoiceFile())) == "aten"
    assert timer.calls == 2


def test_other_code_has_other_files(monkeypatch):
    ask(Chooser("auto", FakeTimer(), ChoiceFile()))
    monkeypatch.setattr(choice_file, "version_key", lambda: "0123456789abcdef")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(Chooser("auto", timer := FakeTimer(), ChoiceFile()))
    assert timer.calls == 1
    assert len(list(choice_file.cache_folder().iterdir())) == 2


def test_the_version_tells_code_apart(monkeypatch, tmp_path):
    def keyed() -> str:
        choice_file.version_key.cache_clear()
        return choice_file.version_key()

    monkeypatch.undo()
    keys = [keyed(), keyed()]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        keys.append(keyed())
    with monkeypatch.context() as patch:
        patch.setattr(choice_file, "__version__", "9.9")
        keys.append(keyed())
    with monkeypatch.context() as patch:
        patch.setattr(choice_file, "version", lambda name: "9.9")
        keys.append(keyed())
    table = tmp_path / "tables.py"
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    with monkeypatch.context() as patch:
        patch.setattr(choice_file, "find_spec", lambda name: spec)
        for text in ("BLOCK = 64", "BLOCK = 128"):
            table.write_text(text)
            keys.append(keyed())
        patch.setattr(choice_file, "find_spec", lambda name: None)
        keys.append(keyed())
    assert keyed() == keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


def with_entries(entries) -> str:
    return json.dumps({"version": choice_file.version_key(), "entries": entries})


BAD = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(with_entries({"a": {"split": 1.0}})[:-5]),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00" * 50),
    "list": lambda path: path.write_text("[1, 2]"),
    "foreign": lambda path: path.write_text(json.dumps({"version": "1", "entries": {}})),
    "entries": lambda path: path.write_text(with_entries(["a"])),
    "times": lambda path: path.write_text(with_entries({"a": 3})),
    "no-times": lambda path: path.write_text(with_entries({"a": {}})),
    "negative": lambda path: path.write_text(with_entries({"a": {"split": -1.0}})),
    "nan": lambda path: path.write_text(with_entries({"a": {"split": float("nan")}})),
    "text": lambda path: path.write_text(with_entries({"a": {"split": "1.0"}})),
    "true": lambda path: path.write_text(with_entries({"a": {"split": True}})),
    "deep": lambda path: path.write_text("[" * 100_000),
    "large": lambda path: path.write_text(" " * (choice_file.MAX_BYTES + 1)),
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD.keys())
def test_a_bad_file_costs_one_warning_and_is_replaced(spoil):
    path = choice_file.cache_folder() / f"choices-{choice_file.version_key()}.json"
    path.parent.mkdir(parents=True)
    spoil(path)
    chooser = Chooser("auto", timer := FakeTimer(), ChoiceFile())
    keys = [KEY, choice_key(1, 8, 8, 1, torch.float16)]
    with pytest.warns(RuntimeWarning, match="cache of kernel choices.*it is ignored") as caught:
        assert [ask(chooser, key=key) for key in keys] == ["aten"] * 2
    assert len(caught) == 1
    assert timer.calls == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ChoiceFile().read()) == 2


@pytest.mark.parametrize("obstacle", ["folder is a file", "file is a folder", "cannot replace"])
def test_a_file_that_cannot_be_written_costs_one_warning(obstacle, monkeypatch, tmp_path):
    folder = choice_file.cache_folder()
    if obstacle == "folder is a file":
        folder.write_text("")
    elif obstacle == "file is a folder":
        (folder / f"choices-{choice_file.version_key()}.json" / "x").mkdir(parents=True)
    else:

        def refuse(source, target):
            raise PermissionError("read-only")

        monkeypatch.setattr(os, "replace", refuse)
    chooser = Chooser("auto", timer := FakeTimer(), ChoiceFile())
    keys = [choice_key(1, n, 8, 1, torch.float16) for n in (8, 9, 8, 9)]
    with pytest.warns(RuntimeWarning, match="it is ignored") as caught:
        assert [ask(chooser, key=key) for key in keys] == ["aten"] * 4
    assert len(caught) == 1
    assert timer.calls == 2
    assert not list(tmp_path.rglob("*.json.*"))  # no temporary file stays


def test_files_take_in_what_others_wrote():
    first, second = ChoiceFile(), ChoiceFile()
    assert first.read() == second.read() == {}
    first.add("a", {"split": 1.0})
    second.add("b", {"aten": 2.0})
    assert ChoiceFile().read() == {"a": {"split": 1.0}, "b": {"aten": 2.0}}


def write_many(name: str) -> None:
    file = ChoiceFile()
    for i in range(60):
        file.add(f"{name} {i}", {"split": 1.0 + i})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert f"{name} {i}" in {**ChoiceFile().read(), **file.read()}


def test_processes_that_write_at_once_leave_a_whole_file():
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = ChoiceFile().read()
    assert {"a 59", "b 59"} & found.keys()
    assert len(found) >= 60
    assert len(list(choice_file.cache_folder().iterdir())) == 1


# --- the report


def test_report_shows_the_choices_and_the_backend(monkeypatch):
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2))
    report = fastpeft.report(model)
    assert report.backend == "torch on cpu"
    assert report.kernels == ()
    assert "\nbackend: torch on cpu\n" in str(report)
    assert "kernels:" not in str(report)
    monkeypatch.setattr(choice, "CHOOSER", chooser := Chooser("auto", FakeTimer()))
    ask(chooser, key=choice_key(4096, 8, 8, 16, torch.bfloat16))
    ask(chooser)
    ask(chooser, key=choice_key(64, 4096, 4096, 16, torch.bfloat16))
    text = str(fastpeft.report(model))
    assert (
        "\nkernels: lora_forward M<=64 N=4096 K=4096 r<=16 bf16: aten (1.00), split 1.25, single 2.00"
        "\nkernels: lora_forward M<=1024 N=4096 K=4096 r<=16 bf16: aten (1.00), split 1.25, single 2.00"
        "\nkernels: lora_forward M<=4096 N=8 K=8 r<=16 bf16: aten (1.00), split 1.25, single 2.00\n"
    ) in text
    assert report.summary() == fastpeft.report(model).summary()


def test_report_says_when_the_chosen_backend_cannot_run(monkeypatch):
    model = fastpeft.patch(llama(torch.float64), fastpeft.LoRA(r=2))
    with fastpeft.use_backend("triton"):
        assert "backend: triton, which cannot run: " in str(fastpeft.report(model))
