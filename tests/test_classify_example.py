"""The comparison of all methods, end to end, on a tiny random BERT and made reviews; no downloads."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tests.test_example import examples_on_path, one_thread  # noqa: E402, F401  (fixtures)

GOOD, BAD = ("fine", "bright"), ("dull", "slow")
THINGS = ("film", "plot", "cast", "song", "scene", "ending", "joke", "hero", "score", "trip")


@pytest.fixture(scope="module")
def classify():
    return importlib.import_module("classify")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Reviews that one word decides, in the file's form."""
    lines, number = [], 0
    for first in THINGS:
        for second in THINGS:
            for word, rating in zip(GOOD + BAD, (2.0, 1.0, -2.0, -1.0), strict=True):
                number += 1
                lines.append(f"{number}\t{rating}\tthe {first} and the {second} are {word}")
    lines.append(f"{number + 1}\t3.0\t{'the film ' * 40}")  # too long
    lines.append(f"{number + 2}\t0.1\tthe film is neither")  # not clear
    path = tmp_path_factory.mktemp("data") / "reviews.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("model") / "tiny-bert"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *sorted({w for w in data.read_text().split() if w.isalpha()}),
    ]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(model_folder, data, tmp_path):
    return [
        *("--model", str(model_folder), "--data", str(data), "--out", str(tmp_path / "out")),
        *("--cache", str(tmp_path / "cache"), "--held-out", "60", "--tuning", "40", "--train", "200"),
        *("--steps", "10", "--tuning-steps", "3", "--seeds", "2"),
    ]


def test_every_method_a_stopped_run_and_the_table(classify, arguments, tmp_path, capsys, monkeypatch):
    file = tmp_path / "out" / "classify.json"
    whole = classify.trained
    begun = []

    def stopped(job, name, *rest):
        begun.append(name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return whole(job, name, *rest)

    monkeypatch.setattr(classify, "trained", stopped)
    assert classify.main(arguments) == 130
    halfway = json.loads(file.read_text())
    assert list(halfway["runs"]) == begun[:2]

    def must_not(*_):
        raise AssertionError("done already")

    for step in ("tune", "memory", "refusal"):
        monkeypatch.setattr(classify, step, must_not)
    monkeypatch.setattr(
        classify, "trained", lambda job, name, *rest: begun.append(name) or whole(job, name, *rest)
    )
    assert classify.main(arguments) == 0
    found = json.loads(file.read_text())
    assert found["runs"]["full"]["0"] == halfway["runs"]["full"]["0"]
    refused = {"prefix", "prompt"}
    trains = [n for n, entry in classify.ENTRIES.items() if entry.rates and n not in refused]
    assert list(found["runs"]) == trains
    assert len(begun) == 2 * len(trains) + 1, "each finished run once"
    for name in trains:
        assert set(found["runs"][name]) == {"0", "1"}
        assert f"{found['rate'][name]:g}" in found["tuning"][name]
        assert len(found["tuning"][name]) <= classify.MOST_RATES
        assert all(math.isfinite(run["loss"]) for run in found["runs"][name].values())
    assert {n for n, reason in found["refused"].items() if reason} == refused
    trained = {name: held["trained"] for name, held in found["memory"].items()}
    assert trained["dora"] > trained["rslora"] == trained["lora"] == trained["ist"] > trained["lora-fa"]
    assert trained["bitfit"] < trained["lora"] < trained["full"] == trained["badam"]
    peak = {name: held["peak"] for name, held in found["memory"].items()}
    assert peak["badam"] < peak["lisa"] < peak["full"]
    assert peak["lora"] < peak["full"]
    assert (tmp_path / "out" / "classify.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    assert classify.main(["--table", str(file)]) == 0
    printed = capsys.readouterr().out
    for name, entry in classify.ENTRIES.items():
        line = next(line for line in printed.splitlines() if f"│ {entry.label}" in line)
        if name in refused:
            assert "not possible" in line
        elif entry.rates:
            assert f"{trained[name]:,}" in line
            assert "±" in line
    assert "prefix tuning: virtual tokens are for decoders" in printed
    assert "not measured yet" in printed
    assert classify.main([*arguments, "--steps", "11"]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_times_are_a_measurement_of_their_own(classify, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(classify, "ROUNDS", 2)
    few = [*arguments, "--methods", "lora", "bitfit", "prefix", "probe"]
    assert classify.main([*few, "--seeds", "1", "--steps", "3"]) == 0
    monkeypatch.setattr(classify, "trained", lambda *_: pytest.fail("a time is no training"))
    capsys.readouterr()
    assert classify.main([*few, "--seeds", "1", "--steps", "3", "--times"]) == 0
    seconds = json.loads((tmp_path / "out" / "classify.json").read_text())["seconds"]
    assert set(seconds["step"]) == {"lora", "bitfit"}
    assert seconds["rounds"] == 2
    printed = capsys.readouterr().out
    assert f"{1000 * seconds['step']['lora']:.0f}" in next(
        line for line in printed.splitlines() if "│ LoRA " in line
    )
    assert "not measured yet" not in printed


def test_quick_is_quick(classify, model_folder, data, tmp_path):
    run = [
        "--model",
        str(model_folder),
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--cache",
        str(tmp_path),
    ]
    assert classify.main([*run, "--quick", "--methods", "lora", "ist"]) == 0
    settings = json.loads((tmp_path / "classify.json").read_text())["settings"]
    assert (settings["quick"], settings["steps"], settings["train"]) == (True, 4, 64)


def prepared(classify, model_folder, data, tmp_path, **options):
    sizes = {"held_out": 60, "tuning": 40, "train": 200, "length": 24, "batch": 16, **options}
    return classify.prepare(
        classify.argparse.Namespace(data=data, model=model_folder, cache=tmp_path, **sizes)
    )


def test_every_method_learns(classify, model_folder, data, tmp_path):
    """With a head that is not fitted and hardly trains, so that the method has to."""
    job = prepared(classify, model_folder, data, tmp_path)
    for name, entry in classify.ENTRIES.items():
        if entry.rates and not classify.refusal(job, name):
            torch.manual_seed(0)
            training = job.begin(name, 10 * entry.rates[-1], 0, 40)
            losses = [training.step() for _ in range(40)]
            assert sum(losses[-8:]) < sum(losses[:8]), name


def test_every_method_starts_from_the_probe(classify, model_folder, data, tmp_path):
    job = prepared(classify, model_folder, data, tmp_path)
    known = classify.results.Results(tmp_path / "known.json", {})
    job.head = classify.probe(job, known)
    again = classify.results.Results(tmp_path / "known.json", {})
    assert all(torch.equal(a, b) for a, b in zip(job.head, classify.probe(job, again), strict=True))
    for name in ("full", "lora", "ln-lora", "series", "lisa"):
        start = job.begin(name, 1e-3, 0, 5).model
        assert job.score(start, job.held_out)[1] == pytest.approx(known.found["probe"]["loss"], rel=1e-4), (
            name
        )


def test_splits_are_apart_and_the_same_every_time(classify, model_folder, data, tmp_path):
    job, again = (prepared(classify, model_folder, data, tmp_path, train=10_000) for _ in range(2))
    parts = [{tuple(ids) for ids in rows.ids} for rows in (job.train, job.tuning, job.held_out)]
    assert [len(part) for part in parts] == [300, 40, 60]
    assert len(set.union(*parts)) == 400
    assert job.train.ids == again.train.ids
    assert torch.equal(job.held_out.labels, again.held_out.labels)
    lengths = [len(ids) for ids in job.held_out.ids]
    assert lengths == sorted(lengths)
    with pytest.raises(
        classify.InputError, match="400 different snippets short enough: expected more than 390"
    ):
        classify.split([([1], 0)] * 400, 390, 10)


def test_every_row_once_before_any_comes_again(classify):
    lengths = [i % 13 + 1 for i in range(64)]
    for given in (None, lengths):
        order = classify.classifier.orders(64, 8, 3, given)
        batches = [next(order) for _ in range(16)]
        assert sorted(torch.cat(batches[:8]).tolist()) == list(range(64))
        assert sorted(torch.cat(batches[8:]).tolist()) == list(range(64))
        repeated = classify.classifier.orders(64, 8, 3, given)
        assert all(torch.equal(batch, next(repeated)) for batch in batches)
    spans = [max(lengths[r] for r in b.tolist()) - min(lengths[r] for r in b.tolist()) for b in batches]
    assert max(spans) <= 3, "like lengths together"


def test_padding_changes_nothing(classify, model_folder, data, tmp_path):
    job = prepared(classify, model_folder, data, tmp_path)
    rows = classify.Rows([job.train.ids[0], job.train.ids[1] + job.train.ids[2]], torch.tensor([0, 1]))
    batch, model = job.batches(rows), job.build().eval()
    with torch.no_grad():
        together = model(**batch(torch.tensor([0, 1]))[0]).logits
        alone = model(**batch(torch.tensor([0]))[0]).logits
    torch.testing.assert_close(together[:1], alone)


def test_the_head_is_the_best_of_its_kind(classify):
    """Its gradient is zero, decay included; and its decay is the one that does best on other rows."""
    generator = torch.Generator().manual_seed(0)
    features = 3 + 2 * torch.randn(200, 6, generator=generator)
    labels = (features[:, 0] + torch.randn(200, generator=generator) > 3).long()
    weight, bias = classify.classifier.fit_head(features, labels, 2, 0.01)
    mean, deviation = features.double().mean(0), features.double().std(0)
    w = (weight.double() * deviation).requires_grad_()
    b = (bias.double() + weight.double() @ mean).requires_grad_()
    logits = (features.double() - mean) / deviation @ w.T + b
    (torch.nn.functional.cross_entropy(logits, labels) + 0.005 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-4
    assert b.grad.abs().max() < 1e-4
    train, apart = (features[:20], labels[:20]), (features[20:], labels[20:])
    *_, decay = classify.classifier.best_head(train, apart, 2, (1e-5, 0.1, 1e4))
    assert decay == 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "expected at least 1"),
        (["--length", "3"], "--length: at least 4"),
        (["--held-out", "4000"], "expected more than 4000 to hold out"),
        (["--data", "/nowhere.txt"], "--data /nowhere.txt: No such file or directory"),
        (["--model", "/nowhere"], "--model /nowhere: not a transformers model folder, it has no config.json"),
        (["--table", "/nowhere.json"], "/nowhere.json: cannot read it as results"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(classify, arguments, options, said, capsys):
    assert classify.main([*arguments, *options]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.startswith("classify.py: ")
    assert printed.count("\n") == 1
