"""The main job, end to end, on a tiny random Llama and a tiny text; nothing is downloaded."""

from __future__ import annotations

import importlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

LINES = (
    "KING.\nWhat news from the battle, good cousin?\n",
    "MESSENGER.\nThe field is ours, my lord, and the enemy fled.\n",
    "QUEEN.\nThen let the bells be rung in every town.\n",
    "FOOL.\nAnd let the cook be told, for joy is hungry.\n",
)


@pytest.fixture(scope="module", autouse=True)
def examples_on_path():
    """The scripts import each other by plain name, as `python examples/finetune.py` has it."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small gain nothing from threads, and lose much when test workers share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finetune():
    return importlib.import_module("finetune")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text("\n".join(LINES[i % len(LINES)] for i in range(120)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, text):
    """A random two-layer Llama with a byte-level BPE trained on the text."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train([str(text)], vocab_size=300, special_tokens=["<end>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(model_folder, text, tmp_path):
    """Options of a run that takes a second or two."""
    return [
        *("--model", str(model_folder), "--text", str(text), "--out", str(tmp_path / "out")),
        *("--cache", str(tmp_path / "cache"), "--rank", "4", "--alpha", "8", "--lr", "2e-2"),
        *("--steps", "30", "--batch", "4", "--sequence", "33"),
    ]


@pytest.mark.parametrize(("fp32_wins", "expected"), [(True, "fp32"), (False, "bf16")])
def test_the_dtype_is_the_one_this_cpu_is_quick_in(fp32_wins, expected, monkeypatch):
    options, dtypes = (importlib.import_module(name) for name in ("options", "dtypes"))
    monkeypatch.setattr(dtypes, "fp32_is_faster", lambda dtype: fp32_wins)
    assert options.parse([]).dtype == expected
    assert options.parse(["--dtype", "bf16"]).dtype == "bf16"


@pytest.mark.parametrize(("method", "dtype"), [("lora", "fp32"), ("lora", "bf16"), ("dora", "bf16")])
def test_whole_job(finetune, arguments, tmp_path, capsys, method, dtype):
    out = tmp_path / "out"
    assert finetune.main([*arguments, "--method", method, "--dtype", dtype]) == 0

    figures = json.loads((out / "figures.json").read_text())
    assert len(figures["losses"]) == 30
    assert sum(figures["losses"][-5:]) < sum(figures["losses"][:5])
    (title,) = figures["perplexity_before"]
    assert figures["perplexity_after"][title] < figures["perplexity_before"][title]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["use_dora"]) == (4, method == "dora")

    printed = capsys.readouterr().out
    assert "reloaded by fastpeft: same" in printed
    assert "reloaded by peft: same" in printed or "peft is not installed" in printed
    assert "sample before" in printed
    assert "sample after" in printed
    assert "step 30/30" in printed  # plain lines, since this is no terminal


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("lisa", "fp32"), ("lisa", "bf16"), ("badam", "fp32"), ("topk", "fp32"), ("ist", "fp32")],
)
def test_whole_job_a_few_layers_at_a_time(finetune, arguments, tmp_path, capsys, method, dtype):
    out = tmp_path / "out"
    run = [*arguments, "--method", method, "--dtype", dtype, "--layers", "1", "--period", "3"]
    assert finetune.main(run) == 0
    figures = json.loads((out / "figures.json").read_text())
    (title,) = figures["perplexity_before"]
    assert figures["perplexity_after"][title] < figures["perplexity_before"][title]
    active = figures["layers"]["active"]
    assert len(active) == 30
    assert {block for blocks in active for block in blocks} == ({1} if method == "topk" else {0, 1})
    assert all(len(blocks) == 1 for blocks in active)
    assert all(active[i] == active[i - i % 3] for i in range(30))  # a choice holds for a period
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert (out / ("adapter" if method == "ist" else "model")).is_dir()
    printed = capsys.readouterr().out
    assert "reloaded by fastpeft: same" in printed or "reloaded by transformers: same" in printed
    assert "blocks " in printed


def test_equal_seeds_repeat_a_run(finetune, arguments, tmp_path):
    runs = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run = [*arguments, "--out", str(tmp_path / name), "--steps", "4", "--dropout", "0.1", "--seed", seed]
        assert finetune.main(run) == 0
        runs.append(json.loads((tmp_path / name / "figures.json").read_text())["losses"])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_reloaded_adapter_that_differs_is_an_error(finetune, arguments, monkeypatch, capsys):
    def load_nothing_trained(model, folder):
        return finetune.fastpeft.patch(model, finetune.fastpeft.LoRA(r=4))

    monkeypatch.setattr(finetune.fastpeft, "load", load_nothing_trained)
    assert finetune.main(arguments) == 1
    assert "reloaded by fastpeft: DIFFERENT" in capsys.readouterr().out


def test_without_peft_its_check_is_skipped(finetune, arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert finetune.main([*arguments, "--steps", "2"]) == 0
    assert "peft is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "argument --rank: expected a whole number of at least 1, got '0'"),
        (["--rank", "many"], "argument --rank: expected a whole number of at least 1, got 'many'"),
        (["--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'"),
        (["--sequence", "1"], "argument --sequence: expected a whole number of at least 2, got '1'"),
        (["--dropout", "1"], "argument --dropout: expected a number from 0 to below 1, got '1'"),
        (["--lr", "nan"], "argument --lr: expected a number above 0, got 'nan'"),
        (["--alpha", "0"], "argument --alpha: expected a number above 0, got '0'"),
        (["--method", "full"], "argument --method: invalid choice: 'full'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(finetune, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(options)
    assert stop.value.code == 2
    check_one_line(capsys.readouterr().err, message)


def test_wrong_files(finetune, arguments, model_folder, tmp_path, capsys):
    empty, short, binary = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    short.write_text("Good morrow, cousin.\n")
    binary.write_bytes(b"\xff\xfe\x00play")
    no_tokenizer = tmp_path / "no-tokenizer"
    no_tokenizer.mkdir()
    (no_tokenizer / "config.json").write_text((model_folder / "config.json").read_text())
    cases = [
        (["--model", str(tmp_path / "nowhere")], "nowhere: not a transformers model folder"),
        (["--model", str(tmp_path)], "not a transformers model folder, it has no config.json"),
        (["--model", str(no_tokenizer)], "cannot load its tokenizer"),
        (["--text", str(tmp_path / "none.txt")], "none.txt: No such file or directory"),
        (["--text", str(tmp_path)], "Is a directory"),
        (["--text", str(empty)], "the file holds no text"),
        (["--text", str(short)], "text too short"),
        (["--text", str(binary)], "not UTF-8 text"),
        (["--prompt", " "], "--prompt: holds no text"),
        (["--sequence", "65"], "--sequence 65: the model takes at most 64 tokens"),
        (["--out", str(short / "out")], "cannot write there: Not a directory"),
        (["--cache", str(short)], "cannot write there: File exists"),
    ]
    for options, message in cases:
        assert finetune.main([*arguments, *options]) == 2, options
        check_one_line(capsys.readouterr().err, message)


def test_help_names_every_option(finetune, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in finetune.options.Options.__dataclass_fields__:
        assert f"--{name} " in printed


def test_last_tenth_of_a_text_file_is_held_out(finetune, text):
    corpus = finetune.corpus.from_file(text)
    (train,), (held_out,) = corpus.train.values(), corpus.held_out.values()
    assert train + held_out == text.read_text()
    assert train.endswith("\n")
    assert 0.08 < len(held_out) / len(train + held_out) < 0.12


def test_windows_do_not_cross_texts(finetune):
    class Letters:
        def __call__(self, texts, **_):
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    rows = finetune.corpus.windows(Letters(), ["aaaaa", "bb", "c", "dddd"], 2)
    assert ["".join(map(chr, row)) for row in rows.tolist()] == ["aa", "aa", "bb", "dd", "dd"]
    assert finetune.corpus.spread(rows, 2).tolist() == [rows[0].tolist(), rows[-1].tolist()]


def test_plays_are_held_out_by_name(finetune, tmp_path):
    shakespeare = finetune.shakespeare
    archive = tmp_path / "archive.tar.gz"
    members = {
        "hamlet_gut.txt": "HAMLET\n\nPersons\n\nACT I.\nWho's there?  \n\nTHE END",
        "macbeth_gut.txt": "MACBETH\n\nACT I.\nWhen shall we three meet again?\n",
        "macbeth_gut_f.txt": "MACBETH\n\nACT I.\nWhen shall we three meet againe?\n",
        "tempest_gut.txt": "THE TEMPEST\n\nACT 1\nBoatswain!\n",
        "the_tempest_again_gut.txt": "THE TEMPEST\n\nACT 1\nBoatswain!\n",
        "sonnets_gut.txt": "THE SONNETS\n\nFrom fairest creatures\n",
        "../../escape_gut.txt": "ESCAPE\n\nACT I.\nOut!\n",
    }
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"texts/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    corpus = shakespeare.split(shakespeare.read_plays(archive))
    assert corpus.held_out.keys() == {"Macbeth", "The Tempest"}
    assert corpus.train == {"hamlet": "ACT I.\nWho's there?\n", "escape": "ACT I.\nOut!\n"}
    assert not list(tmp_path.parent.glob("escape*"))  # read in place, never unpacked

    with pytest.raises(finetune.InputError, match="held-out plays not found: The Tempest"):
        shakespeare.split({"hamlet": "a", "macbeth": "b"})


def check_one_line(printed: str, message: str) -> None:
    assert message in printed
    assert printed.startswith("finetune.py: ")
    assert printed.count("\n") == 1


@pytest.fixture
def comparison(model_folder, text, tmp_path):
    return [
        *("--model", str(model_folder), "--text", str(text), "--out", str(tmp_path / "compare")),
        *("--cache", str(tmp_path / "cache"), "--dtype", "fp32", "--batch", "2", "--sequence", "17"),
        *("--steps", "6", "--tuning-steps", "2", "--seeds", "2"),
    ]


def test_methods_are_compared_and_a_stopped_comparison_goes_on(comparison, tmp_path, capsys, monkeypatch):
    compare = importlib.import_module("compare")
    monkeypatch.setattr(compare, "ROUNDS", 1)
    assert compare.main(comparison) == 0
    file = tmp_path / "compare" / "compare.json"
    found = json.loads(file.read_text())
    assert set(found["runs"]) == set(compare.METHODS)
    for name, runs in found["runs"].items():
        assert set(runs) == {"0", "1"}
        assert f"{found['rate'][name]:g}" in found["tuning"][name]
        for run in runs.values():
            assert run["equal_steps"] < found["before"]
            assert run["steps"] >= 6
            assert (run["equal_time"] == run["equal_steps"]) == (run["steps"] == 6)
    # What only active layers cost, of the same model.
    full, lisa, badam, lora = (found["runs"][n]["0"]["memory"] for n in ("full", "lisa", "badam", "lora"))
    assert full["moments"] == 2 * full["weights"] == 2 * full["gradients"]
    assert badam["moments"] < lisa["moments"] <= full["moments"]
    assert lora["weights"] > full["weights"]
    assert (tmp_path / "compare" / "compare.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert all(name in table for name in compare.METHODS)

    def must_not(*_):
        raise AssertionError("done already")

    for step in ("tune", "timed", "trained"):
        monkeypatch.setattr(compare, step, must_not)
    assert compare.main(comparison) == 0
    assert json.loads(file.read_text()) == found
    assert compare.main([*comparison, "--steps", "7"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert compare.main([*comparison, "--steps", "0"]) == 2


def test_the_papers_figures_are_drawn(model_folder, text, tmp_path, capsys):
    instruments = importlib.import_module("instruments")
    words = ["--model", str(model_folder), "--text", str(text), "--cache", str(tmp_path / "cache")]
    words += ["--steps", "3", "--sequence", "17", "--out", str(tmp_path / "figures")]
    assert instruments.main(words) == 0
    found = json.loads((tmp_path / "figures" / "instruments.json").read_text())
    for name in ("weight_norms", "changes", "removal"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    layers = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]  # its head is tied
    assert all(list(norms) == layers for norms in found["weight_norms"].values())
    full, lora = found["accounts"]["full"], found["accounts"]["lora"]
    assert full["trained"] == full["parameters"] == full["gradients"] // 4
    assert lora["gradients"] == lora["adapters"] < full["gradients"]
    assert {change["kind"] for change in found["changes"]["dora"]} == {"q_proj"}
    greedy, drawn = found["removal"]["greedy"], found["removal"]["random"]
    assert set(greedy["order"]) == set(drawn["order"]) == set(layers[1:3])
    assert greedy["losses"][0] == drawn["losses"][0]
    assert greedy["losses"][-1] == pytest.approx(drawn["losses"][-1])
    assert greedy["losses"][1] <= drawn["losses"][1]
    assert "correlation of ΔD and ΔM" in capsys.readouterr().out
    assert instruments.main([*words, "--removals", "5"]) == 2
    error = capsys.readouterr().err
    assert error == "instruments.py: --removals: expected at most 2, the model's blocks, got 5\n"
    assert instruments.main([*words, "--steps", "0"]) == 2
