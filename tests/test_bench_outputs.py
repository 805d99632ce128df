"""Files, comparisons, pictures and the README's figures, all made of one results document."""

from __future__ import annotations

import csv
import json
from xml.etree import ElementTree

import pytest

from bench import __main__ as bench_cli
from bench import clock, comparison, machine, outputs, plot, readme, records, summaries, tables

MACHINE = {"cpu": "Example(R) CPU 9", "threads": "2 of 2 logical CPUs", "instructions": "avx2 (torch: AVX2)",
           "GEMM": "fp32 45 GFLOP/s", "torch": "2.13.0", "fastpeft commit": "abc"}  # fmt: skip


def _result(contender, seconds, saved, **rest):
    case = {"model": "tiny", "dtype": "float32", "rank": 16, "batch": 1, "sequence": 8}
    return {**case, "contender": contender, "seconds": {"step": seconds}, "saved_bytes": saved, **rest}


def _document(scale=1.0):
    return {
        "command": "python -m bench step --model tiny",
        "machine": dict(MACHINE),
        "results": [
            _result("frozen", [1.0 * scale, 1.1 * scale, 1.2 * scale], 2**20),
            _result("peft-lora", [2.0 * scale, 2.2 * scale, 2.4 * scale], 4 * 2**20),
            _result("fastpeft-lora", [1.0 * scale, 1.1 * scale, 1.2 * scale], 2 * 2**20),
            {"contender": "unsloth-lora", "blocked": "cannot run here: needs a GPU"},
        ],
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    folder = tmp_path / "bench" / "results"
    monkeypatch.setattr(outputs, "RESULTS", folder)
    monkeypatch.setattr(readme, "RESULTS", folder)
    return folder


def test_ratios_are_taken_against_the_peer_round_by_round():
    ((_, found), _) = records.by_case(_document()).items()
    assert records.speed_up(found["fastpeft-lora"], found).median == pytest.approx(2.0)
    assert records.speed_up(found["fastpeft-lora"], found).half_range == pytest.approx(0.0)
    assert records.speed_up(found["peft-lora"], found) is None
    assert records.time_ratio(found["peft-lora"], found["frozen"]).median == pytest.approx(2.0)
    assert records.method_of("peft-compiled-dora") == "dora"
    assert records.method_of("lisa, embeddings frozen") == ""


def test_csv_and_markdown_hold_every_measure():
    rows = list(csv.DictReader(tables.csv_text(_document()).splitlines()))
    assert len(rows) == 6
    row = next(r for r in rows if (r["contender"], r["measure"]) == ("peft-lora", "step"))
    assert (float(row["median"]), row["unit"], row["rounds"]) == (2.2, "s", "3")
    assert row["case"] == "tiny, batch 1, sequence 8, float32, r=16"
    text = tables.markdown_text(_document())
    assert "| fastpeft-lora | 1100 ±50 ms | 2.00 MiB | 2.00x ±0.00 |" in text
    assert "unsloth-lora | not measured: cannot run here: needs a GPU" in text


def test_compare_gives_the_ratio_of_each_case(capsys):
    comparison.show(_document(), _document(scale=3.0))
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "fastpeft-lora" in line]
    assert any("3.00" in line and "more" in line for line in lines)  # time
    assert any("1.00" in line and "more" not in line for line in lines)  # bytes
    other = _document()
    other["machine"]["torch"] = "2.99"
    comparison.show(_document(), other)
    assert "torch (2.13.0; 2.99)" in capsys.readouterr().out


def test_save_makes_a_file_for_machine_and_suite_and_readme_its_table(results, tmp_path, capsys):
    path = outputs.saved_path(_document())
    assert path == results / "example-9-avx2-2-threads" / "step-tiny-float32.json"
    outputs.write(_document(), outputs.split("step", ["--save"])[0])
    assert records.read(path) == _document()
    outputs.write(_document(), outputs.split("step", ["--save", "other"])[0])
    assert {p.name for p in path.parent.iterdir()} == {"step-tiny-float32.json", "step-other.json"}
    (path.parent / "step-other.json").unlink()

    text = tmp_path / "README.md"
    text.write_text(f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n")
    assert readme.main(["--file", str(text), "--check"]) == 1
    assert "stale" in text.read_text()
    assert readme.main(["--file", str(text)]) == 0
    made = text.read_text()
    assert made.startswith(f"before\n{readme.BEGIN}\n")
    assert made.endswith(f"{readme.END}\nafter\n")
    assert "stale" not in made
    assert "| fastpeft-lora, r=16 | 1100 | **2.00x** | 1.00 | 2.0 |" in made
    assert "### Example(R) CPU 9; 2 of 2 logical CPUs" in made
    assert "Not measured: unsloth-lora: cannot run here: needs a GPU." in made
    assert readme.main(["--file", str(text), "--check"]) == 0
    capsys.readouterr()
    text.write_text("no markers")
    with pytest.raises(SystemExit) as stop:
        readme.main(["--file", str(text)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_repositorys_readme_is_what_its_results_give():
    assert readme.main(["--check"]) == 0


def test_every_saved_file_has_a_table():
    paths = list(outputs.RESULTS.glob("*/*.json"))
    assert paths
    for path in paths:
        document = records.read(path)
        assert machine.name(document["machine"]) == path.parent.name
        assert summaries.table(document) or records.suite_of(document) == "profile"


def test_plot_writes_readable_bars_in_both_formats(tmp_path):
    from matplotlib.image import imread

    speed, size = plot.bars(_document())
    assert [(bar.contender, round(bar.mean, 6)) for bar in speed] == [("fastpeft-lora", 2.0)]
    assert [(bar.contender, bar.values, bar.floors) for bar in size] == [
        ("peft-lora", (1.0,), (0.25,)), ("fastpeft-lora", (0.5,), (0.25,))
    ]  # fmt: skip
    written = plot.draw(_document(), tmp_path / "picture.png")
    assert [path.name for path in written] == ["picture.png", "picture.svg"]
    assert imread(written[0]).shape[1] == 1400
    assert ElementTree.parse(written[1]).getroot().tag.endswith("svg")
    assert plot.draw({"results": [], "machine": {}, "command": ""}, tmp_path / "none.png") == []
    assert not (tmp_path / "none.png").exists()


def test_outputs_of_a_real_run_agree(tmp_path, results, capsys):
    words = ["layers", "--blocks", "linear", "--shapes", "16x24x40", "--ranks", "4", "--dtypes", "float32",
             "--peers", "plain", "unsloth", "--methods", "lora", "--rounds", "2",
             "--threads", "1"]  # fmt: skip
    with pytest.raises(SystemExit):
        bench_cli.main(words)  # a peer asked for by name that cannot run is wrong use
    words.remove("unsloth")
    names = {flag: str(tmp_path / f"x.{flag[2:]}") for flag in ("--json", "--csv", "--markdown")}
    flags = [word for pair in names.items() for word in pair]
    assert bench_cli.main([*words, *flags, "--plot", str(tmp_path / "x"), "--save"]) == 0
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["command"] == " ".join(["python -m bench", *words])
    assert {row["contender"] for row in document["results"]} == {
        "frozen", "peft-lora", "inplace-lora", "fastpeft-lora", "plain-lora"
    }  # fmt: skip
    assert (tmp_path / "x.png").exists()
    assert (tmp_path / "x.svg").exists()
    assert len(list(results.glob("*/layers-float32.json"))) == 1
    capsys.readouterr()
    assert bench_cli.main([*words, "--compare", str(tmp_path / "x.json")]) == 0
    assert "now / before" in capsys.readouterr().out


def test_a_selection_writes_a_file_for_each_suite(tmp_path, monkeypatch):
    shape = ["--shape", "16x24x40", "--layer-only", "--rank", "4", "--dropout", "0", "--threads", "1"]
    monkeypatch.setattr(bench_cli, "SHORT", [["memory", *shape], ["memory", *shape, "--blocks", "mlp"]])
    assert bench_cli.main(["--json", str(tmp_path / "all.json")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all-memory-1.json", "all-memory-2.json"]


def test_machine_names_tell_machines_apart():
    assert machine.name(MACHINE) == "example-9-avx2-2-threads"
    assert machine.name({**MACHINE, "gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    assert machine.name({"torch": "2.13.0", "triton": "3.7.1"}) == "counted"


def test_stopwatch_phases_add_up():
    import torch

    watch = clock.Stopwatch(torch.device("cpu"))
    sum(range(1000))
    watch.mark("a")
    watch.mark("b")
    phases = watch.phases("total")
    assert list(phases) == ["total", "a", "b"]
    assert phases["total"] == pytest.approx(phases["a"] + phases["b"])
    assert phases["a"] > 0
    assert clock.mean([{"x": 1.0}, {"x": 3.0}]) == {"x": 2.0}


def test_what_codegen_writes_is_read_by_kernel_and_target(tmp_path):
    row = {"target": "sm_90", "kernel": {"module": "m", "function": "row_norm_kernel"}, "label": "w4",
           "signature": [["x", "*bf16"]], "registers": 80, "spill_stores": 1, "spill_loads": 2,
           "shared": 1024}  # fmt: skip
    path = tmp_path / "codegen.json"
    path.write_text(json.dumps([row, {**row, "label": "w8", "registers": 96}]))
    document = records.read(path)
    assert records.case_text(records.case_of(document["results"][0])) == "sm_90, row_norm, w4"
    assert "signature" not in document["results"][0]
    assert "| sm_90 | 2 | 96 | 1024 | 6 |" in summaries.table(document)
    assert outputs.saved_path(document).relative_to(outputs.RESULTS).as_posix() == "counted/codegen.json"


def test_plans_stand_beside_what_was_measured():
    row = {"model": "tiny", "method": "lisa", "planned": 100 * 2**20, "tracked": 101 * 2**20,
           "resident": 98 * 2**20, "tracked_error": -0.0099, "resident_error": 0.0204}  # fmt: skip
    document = {"command": "python -m bench plan", "machine": {}, "results": [row]}
    assert "| tiny, lisa | 100 | 101 (-1.0%) | 98 (+2.0%) |" in summaries.table(document)
    assert [m.name for m in records.measures(document)] == ["planned", "tracked", "resident"]
    row = {
        "table": "T1",
        "model": "7B",
        "method": "full",
        "peak": 6e10,
        "paper_gb": 59.0,
        "assumptions": "bf16",
    }
    recalled = {**row, "method": "lora", "paper_recalled": True}
    document = {"command": "python -m bench plan --papers", "machine": {}, "results": [row, recalled]}
    table = summaries.table(document)
    assert "| T1 | 7B, full | 60.00 | 59 | bf16 |" in table
    assert "|  | 7B, lora | 60.00 | 59 (recalled) |  |" in table


def test_traffic_stands_beside_the_peers_formulas():
    row = {"target": "sm_90", "shape": "8192x4096x4096", "rank": 16, "dropout": 0.0, "method": "lora",
           "pass": "forward", "launches": [{}, {}], "issued": 2**30, "compulsory": 225 * 2**20}  # fmt: skip
    block = {key: value for key, value in row.items() if key != "shape"}
    block |= {"block": "grouped q/k/v", "tokens": 8, "features": 16, "widths": [16, 4, 4]}
    document = {"command": "python -m bench traffic", "machine": {}, "results": [row, block]}
    table = summaries.table(document)
    assert "| linear 8192x4096x4096, r=16 | LoRA forward | **225** | 2 |" in table
    assert "Unsloth 352" in table  # 2X + W + 3Y at this shape: (2 * 64 + 32 + 3 * 64) MiB
    assert "| grouped q/k/v 8x16x16/4/4, r=16 | LoRA forward | **225** | 2 |  |" in table
    assert {m.name: m.unit for m in records.measures(document)} == {"issued": "bytes", "compulsory": "bytes"}
