"""The vision example, end to end, on a tiny random Dinov2 and made pictures; nothing is downloaded."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("transformers")

from tests.test_example import examples_on_path, one_thread  # noqa: F401  (fixtures)
from tests.test_example_data import pictures, tiny_dinov2


@pytest.fixture(scope="module")
def vision():
    return importlib.import_module("vision")


@pytest.fixture
def arguments(vision, tmp_path, monkeypatch):
    _, model = tiny_dinov2()
    model.save_pretrained(tmp_path / "tiny")
    cache = tmp_path / "cache" / "fashion-mnist"
    cache.mkdir(parents=True)
    for name, data in pictures(cache, monkeypatch, vision.fashion, (400, 200)).items():
        (cache / name).write_bytes(data)
    return [
        *(
            "--model",
            str(tmp_path / "tiny"),
            "--cache",
            str(tmp_path / "cache"),
            "--out",
            str(tmp_path / "out"),
        ),
        *(
            "--train",
            "300",
            "--held-out",
            "120",
            "--side",
            "8",
            "--steps",
            "40",
            "--rank",
            "4",
            "--lr",
            "1e-2",
        ),
    ]


def test_whole_run_a_second_one_and_the_table(vision, arguments, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert vision.main(arguments) == 0
    found = json.loads((out / "vision.json").read_text())
    methods = found["methods"]
    assert list(methods) == ["linear probe", *vision.METHODS]
    for name in vision.METHODS:
        entry = methods[name]
        assert entry["same"], "its adapter was read back"
        assert len(entry["losses"]) == 40
        assert sum(entry["losses"][-5:]) < sum(entry["losses"][:5])
        assert entry["trained"] > methods["linear probe"]["trained"] == 10 * 24 + 10
        assert entry["peak"] > 0
        assert (out / name / "adapter_config.json").is_file()
    assert methods["dora"]["trained"] > methods["lora"]["trained"]
    assert (out / "vision.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert "step 40/40" in printed

    def must_not(*_):
        raise AssertionError("done already")

    monkeypatch.setattr(vision, "trained", must_not)
    monkeypatch.setattr(vision, "probe", must_not)
    assert vision.main(arguments) == 0, "all is known"
    assert vision.main(["--table", str(out / "vision.json")]) == 0
    assert f"{methods['lora']['accuracy']:.1%}" in capsys.readouterr().out
    assert vision.main([*arguments, "--steps", "41"]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_equal_seeds_repeat_a_run(vision, arguments, tmp_path):
    runs = []
    for place, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--out", str(tmp_path / place), "--methods", "ln-lora", "--seed", seed, "--steps", "5"]
        assert vision.main([*arguments, *options]) == 0
        entry = json.loads((tmp_path / place / "vision.json").read_text())["methods"]["ln-lora"]
        runs.append((entry["losses"], entry["accuracy"], entry["peak"]))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


def test_validation_never_sees_the_held_out_pictures(vision, arguments, tmp_path, monkeypatch):
    images = {}
    monkeypatch.setattr(vision, "show", lambda *_: None)
    monkeypatch.setattr(vision, "draw", lambda *_: None)

    def probe(job, head):
        images[len(images)] = (job.train, job.held_out)
        vision.save_file({"weight": torch.zeros(10, 24), "bias": torch.zeros(10)}, head)
        return {"accuracy": 0.0, "trained": 0}

    monkeypatch.setattr(vision, "probe", probe)
    monkeypatch.setattr(vision, "trained", lambda *_: {})
    assert vision.main([*arguments, "--validate", "--out", str(tmp_path / "v")]) == 0
    _, test = vision.fashion.load(tmp_path / "cache", print)
    apart = {picture.numpy().tobytes() for picture in test.pictures}
    (train, scored) = images[0]
    seen = [{picture.numpy().tobytes() for picture in part.pictures} for part in (train, scored)]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & apart
    assert (len(train.labels), len(scored.labels)) == (300, 80)


def test_a_reloaded_adapter_that_differs_is_an_error(vision, arguments, monkeypatch, capsys):
    monkeypatch.setattr(vision.fastpeft, "load", lambda model, folder: model)
    assert vision.main([*arguments, "--methods", "lora"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--side", "9"], "--side 9: expected a multiple of the model's patch, 2"),
        (["--steps", "0"], "--steps, --batch and --side: at least 1"),
        (["--model", "/nowhere"], "--model /nowhere: not a transformers model folder, it has no config.json"),
        (["--table", "/nowhere.json"], "/nowhere.json: cannot read it as results"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(vision, arguments, options, said, capsys):
    assert vision.main([*arguments, *options]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.startswith("vision.py: ")
    assert printed.count("\n") == 1
