"""Hostile and broken adapter folders: one clear error, nothing half-loaded, no hang, no code run.

And saves that are killed or fail: one adapter stays whole.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import fastpeft
from fastpeft import folder_files
from tests.kill_worker import make_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.0.lora_A.weight"


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


@pytest.fixture
def folder(tmp_path) -> Path:
    config = fastpeft.LoRA(r=2, target_modules="all-linear", init_lora_weights=False)
    return fastpeft.save(fastpeft.patch(base(), config), tmp_path / "adapter")


def assert_refused(folder: Path, said: str = "") -> None:
    """load raises one CheckpointError, on a plain and on a patched model, which stay as they were."""
    plain, patched = base(), fastpeft.patch(base(), fastpeft.LoRA(r=2, target_modules="all-linear"))
    for model in (plain, patched):
        before = {name: p.clone() for name, p in model.named_parameters()}
        classes = [type(m) for m in model.modules()]
        with pytest.raises(fastpeft.CheckpointError) as error:
            fastpeft.load(model, folder)
        assert said in str(error.value)
        assert [type(m) for m in model.modules()] == classes
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def rewrite(folder: Path, **changes: object) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def with_header(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_truncated_files(folder, name):
    whole = (folder / name).read_bytes()
    for length in [*range(0, len(whole) - 1, max(1, len(whole) // 40)), len(whole) - 2]:
        (folder / name).write_bytes(whole[:length])
        assert_refused(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_flipped_bits_load_what_the_file_says_or_nothing(folder, name):
    whole, generator = (folder / name).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (folder / name).write_bytes(flipped)
        model = base()
        try:
            fastpeft.load(model, folder)
        except fastpeft.CheckpointError:
            refused += 1
            assert not any("lora" in n for n, _ in model.named_parameters())
            continue
        found = load_file(folder / WEIGHTS)
        assert torch.equal(model[0].lora_A["default"], found[KEY].float())
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert refused > 10


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({}, 2**63),
        ({}, 100_000_000),
        ({}, 0),
        (b"{" * 200_000, None),
        (b"\xff\xfe{}", None),
        ({KEY: {"dtype": "F32", "shape": [10**12, 8], "data_offsets": [0, 64]}}, None),
        ({KEY: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 64]}}, None),
        ({KEY: {"dtype": "F32", "shape": [-2, 8], "data_offsets": [0, 64]}}, None),
        ({KEY: {"dtype": "F32", "shape": [2, 8], "data_offsets": [64, 0]}}, None),
        ({KEY: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 10**15]}}, None),
        ({KEY: {"dtype": "OBJECT", "shape": [2, 8], "data_offsets": [0, 64]}}, None),
        ({KEY: "F32"}, None),
        ([], None),
    ],
    ids=str,
)
def test_headers_made_by_hand(folder, header, length):
    with_header(folder, header, bytes(64), length)
    assert_refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64], ids=str)
def test_tensors_of_other_dtypes(folder, dtype):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, KEY: tensors[KEY].to(dtype)}, folder / WEIGHTS)
    assert_refused(folder, f"{KEY} is {dtype}, expected one of torch.float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(folder, value):
    tensors = load_file(folder / WEIGHTS)
    tensors[KEY][1, 3] = value
    save_file(tensors, folder / WEIGHTS)
    assert_refused(folder, f"{KEY} holds values that are not finite")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "x" * 50_000, "__class__", ""])
def test_names_are_only_names(folder, name):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, name: torch.zeros(1)}, folder / WEIGHTS)
    assert_refused(folder, "in the file, not in the model")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[" * 100_000, ""),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ""),
        (b"[]", "expected a JSON object, got list"),
        (b"\xff\xfe", "damaged"),
        (b" " * (16 * 2**20 + 1), "expected at most 16,777,216"),
        (b"1" * 10_000, ""),
        (b"", "damaged"),
    ],
    ids=["arrays", "objects", "list", "not-utf8", "huge", "long-number", "empty"],
)
def test_configurations_that_are_none(folder, text, said):
    (folder / CONFIG).write_bytes(text)
    assert_refused(folder, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 10**30}, "declared r="),
        ({"r": 10**9}, "declared r=1000000000, the file's lora_A has 2 rows"),
        ({"rank_pattern": {"other": 10**9}}, "r=1000000000, but the file's ranks end at 2"),
        ({"r": "2"}, "r: expected a whole number"),
        ({"r": -1}, "r: expected a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_dropout": 2}, "lora_dropout"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"target_modules": {"a": [[]]}}, "expected a list of module names"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"peft_type": "EVIL"}, "expected a peft_type of LORA"),
        ({"auto_mapping": {"base_model_class": "os.system"}, "r": 3}, "declared r=3"),
    ],
    ids=str,
)
def test_values_that_cannot_be(folder, changes, said):
    rewrite(folder, **changes)
    before = torch.get_num_threads(), _resident()
    assert_refused(folder, said)
    assert _resident() - before[1] < 200 * 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "dangling", "missing"])
def test_what_is_no_file(folder, name, kind):
    file = folder / name
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "missing":
        file.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    start = time.monotonic()
    assert_refused(folder, "not a regular file" if kind in ("folder", "pipe", "device") else "has no")
    assert time.monotonic() - start < 5


def test_a_pickle_is_never_read(folder):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
    assert_refused(folder, "a pickle, which fastpeft never reads")
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)
    assert_refused(folder, "damaged")
    assert not (folder / "ran").exists()


# --- saves that do not come to their end


def held(folder: Path) -> int:
    """Which of the worker's adapters the folder holds, wholly."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    fastpeft.load(model, folder)
    kinds = set()
    for layer in model:
        spec = layer.specs["default"]
        kind = (spec.r - 4) // 4
        assert spec.scaling == (8 + kind) / spec.r
        for tensor in (layer.lora_A["default"], layer.lora_B["default"]):
            assert torch.equal(tensor, torch.full_like(tensor, 1.0 + kind))
        kinds.add(kind)
    assert len(kinds) == 1
    return kinds.pop()


def test_a_killed_save_leaves_one_adapter_whole(tmp_path):
    script, generator = Path(__file__).with_name("kill_worker.py"), random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    seen = set()
    for _ in range(4):
        worker = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "adapter")], env=environment, stdout=subprocess.PIPE
        )
        assert worker.stdout is not None
        worker.stdout.readline()
        # Stopped at a random moment, what is on the disk is what a kill would leave: looked at many times a
        # process, for starting one takes longer than all its saves.
        for _ in range(12):
            time.sleep(generator.random() * 0.02)
            worker.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOWAIT)
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "adapter", copy)
            seen.add(held(copy))
            fastpeft.save(make_model(1), copy)
            assert held(copy) == 1
            assert sorted(p.name for p in copy.iterdir()) == [CONFIG, WEIGHTS]
            shutil.rmtree(copy)
            worker.send_signal(signal.SIGCONT)
        time.sleep(generator.random() * 0.02)
        worker.kill()
        worker.wait()
        seen.add(held(tmp_path / "adapter"))
    assert seen == {0, 1}


@pytest.mark.parametrize("stage", ["save_file", "flush", "replace-weights", "replace-config"])
def test_a_save_that_fails_anywhere_leaves_one_adapter_whole(tmp_path, monkeypatch, stage):
    folder = fastpeft.save(make_model(0), tmp_path / "adapter")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if stage.startswith("replace"):
        replace, name = Path.replace, WEIGHTS if stage == "replace-weights" else CONFIG
        monkeypatch.setattr(Path, "replace", lambda p, to: fail() if p.name == name else replace(p, to))
    else:
        monkeypatch.setattr(folder_files, stage, fail)
    with pytest.raises(fastpeft.CheckpointError, match="No space left"):
        fastpeft.save(make_model(1), folder)
    monkeypatch.undo()
    assert held(folder) == (1 if stage == "replace-config" else 0)
    fastpeft.save(make_model(0), folder)
    assert held(folder) == 0
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    PeftModel.from_pretrained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), folder)
