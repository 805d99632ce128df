"""Hostile and broken adapter folders: one clear error, nothing half-loaded, no hang, no code run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from tests.fuzz_worker import base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.0.lora_A.weight"


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


def truncated(whole: bytes) -> Iterator[bytes]:
    for length in [*range(0, len(whole) - 1, max(1, len(whole) // 40)), len(whole) - 2]:
        yield whole[:length]


def flipped(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    generator = random.Random(seed)
    for _ in range(count):
        mangled = bytearray(whole)
        mangled[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        yield bytes(mangled)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_truncated_files(folder, name):
    for content in truncated((folder / name).read_bytes()):
        (folder / name).write_bytes(content)
        assert_refused(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_flipped_bits_load_what_the_file_says_or_nothing(folder, name):
    refused = 0
    for content in flipped((folder / name).read_bytes(), 150):
        (folder / name).write_bytes(content)
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


HEADERS = [
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
]


@pytest.mark.parametrize(("header", "length"), HEADERS, ids=str)
def test_headers_made_by_hand(folder, header, length):
    with_header(folder, header, bytes(64), length)
    assert_refused(folder)


DTYPES = (torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


NAMES = ("../../etc/passwd", "/etc/passwd", "a\0b", "x" * 50_000, "__class__", "")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_only_names(folder, name):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, name: torch.zeros(1)}, folder / WEIGHTS)
    assert_refused(folder, "in the file, not in the model")


TEXTS = [
    (b"[" * 100_000, ""),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ""),
    (b"[]", "expected a JSON object, got list"),
    (b"\xff\xfe", "damaged"),
    (b" " * (16 * 2**20 + 1), "expected at most 16,777,216"),
    (b"1" * 10_000, ""),
    (b"", "damaged"),
]


@pytest.mark.parametrize(
    ("text", "said"),
    TEXTS,
    ids=["arrays", "objects", "list", "not-utf8", "huge", "long-number", "empty"],
)
def test_configurations_that_are_none(folder, text, said):
    (folder / CONFIG).write_bytes(text)
    assert_refused(folder, said)


VALUES = [
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
]


@pytest.mark.parametrize(("changes", "said"), VALUES, ids=str)
def test_values_that_cannot_be(folder, changes, said):
    rewrite(folder, **changes)
    assert_refused(folder, said)


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


def mangled(folder: Path, into: Path) -> Iterator[Path]:
    """Copies of the folder with everything done to them that the tests above do, and more."""
    tensors = load_file(folder / WEIGHTS)

    def copied() -> Path:
        return Path(shutil.copytree(folder, into / str(len(list(into.iterdir())))))

    for name in (CONFIG, WEIGHTS):
        whole = (folder / name).read_bytes()
        for content in (*truncated(whole), *flipped(whole, 200, seed=1)):
            (copied() / name).write_bytes(content)
        for target in ("/dev/zero", "/proc/self/mem", "nowhere"):
            file = copied() / name
            file.unlink()
            file.symlink_to(target)
        file = copied() / name
        file.unlink()
        os.mkfifo(file)
    for header, length in HEADERS:
        with_header(copied(), header, bytes(64), length)
    for text, _ in TEXTS:
        (copied() / CONFIG).write_bytes(text)
    for changes, _ in VALUES:
        rewrite(copied(), **changes)
    for key, tensor in [
        *((KEY, tensors[KEY].to(dtype)) for dtype in DTYPES),
        *((KEY, tensors[KEY] * value) for value in (float("nan"), float("inf"))),
        *((name, torch.zeros(1)) for name in NAMES),
    ]:
        save_file({**tensors, key: tensor}, copied() / WEIGHTS)
    with (copied() / CONFIG).open("wb") as file:  # a hole: whoever reads it all ends here
        file.truncate(2**40)
    yield from sorted(into.iterdir(), key=lambda path: int(path.name))


def test_no_folder_takes_memory_or_time(folder, tmp_path):
    """In a process that gets no more than 256 MiB beyond what it has, and ten seconds for each."""
    (tmp_path / "mangled").mkdir()
    folders = list(mangled(folder, tmp_path / "mangled"))
    script = Path(__file__).with_name("fuzz_worker.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(256 * 2**20), "10"],
        input="\n".join(map(str, folders)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == len(folders) + 1, (
        f"it died of {folders[len(outcomes) - 1]}: {done.stderr[-2000:]}"
    )
    assert done.returncode == 0
    assert outcomes[0] == ["loaded", 0]
    strange = {str(f): o for f, (o, _) in zip(folders, outcomes[1:], strict=True)}
    strange = {f: o for f, o in strange.items() if o not in ("loaded", "refused")}
    assert not strange
    assert sum(o == "refused" for o, _ in outcomes) > len(folders) // 2
    assert outcomes[-1][1] < 128 * 2**20  # at most, over all of them: a file of 16 MiB is read
