"""The benchmarks measure what they say: statistics, byte counts, the parity gate, the command line."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bench import __main__ as bench_cli
from bench import (
    adapter_files,
    contenders,
    layers,
    measure,
    memory,
    models,
    optimizer,
    parity,
    patch,
    peak,
    profile_step,
    report,
    saved,
    self_check,
    single,
    sparse,
    step,
)
from bench.adapter import Adapter
from bench.blocks import Problem, Shape

TINY = models.WORKLOADS["tiny"]
# Two threads cost more than they give at these sizes, and tests share the cores.
ONE_THREAD = ("--threads", "1")


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_spread_is_median_and_quartiles():
    spread = measure.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert spread.half_range == 1.0
    assert measure.Spread.of([7.0]).half_range == 0.0
    with pytest.raises(ValueError, match="no samples"):
        measure.Spread.of([])


def test_ratio_is_taken_round_by_round():
    # The machine slows down tenfold half-way; within every round one takes twice the other's time.
    fast = [1.0, 1.0, 10.0, 10.0, 10.0]
    slow = [2.0, 2.0, 20.0, 20.0, 20.0]
    ratio = measure.pairwise_ratio(slow, fast)
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="rounds differ"):
        measure.pairwise_ratio(slow, fast[:3])


def test_runs_are_interleaved_and_warm_up_is_dropped():
    order = []

    def run(name):
        def one():
            order.append(name)
            return {"step": float(len(order))}

        return one

    told = []
    runs = {name: run(name) for name in "ABC"}
    samples = measure.interleave(runs, rounds=2, warmup=1, on_run=told.append)
    assert "".join(order) == "ABCABCABC" == "".join(told)
    assert samples == {"A": {"step": [4.0, 7.0]}, "B": {"step": [5.0, 8.0]}, "C": {"step": [6.0, 9.0]}}


def test_saved_bytes_of_a_known_graph():
    x = torch.randn(3, 5, requires_grad=True)
    w = torch.randn(5, requires_grad=True)

    def forward():
        y = x * w  # saves x and w
        z = y.exp()  # saves z: 3 * 5 * 4 bytes
        return (z.view(15) * z.flatten()).sum()  # saves z twice more, as views of one storage

    assert saved.count(forward, [x, w]) == (60, 60)
    assert saved.count(forward, [w]) == (120, 60)  # x was there before: saved, not newly alive
    assert saved.count(forward, []) == (140, 60)


def test_saved_bytes_of_a_dropped_graph_do_not_count():
    x = torch.randn(8, requires_grad=True)

    def forward():
        scale = x.exp().detach()  # the graph of exp is gone; the result is what mul saves: 32 bytes
        return x * scale

    assert saved.count(forward, [x]) == (32, 32)


def test_a_tensor_hidden_from_the_hooks_is_live():
    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.copy = x.clone()
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.copy

    x = torch.randn(16, requires_grad=True)
    assert saved.count(lambda: Hides.apply(x), [x]) == (0, 64)


def test_saved_bytes_of_pefts_layer_are_the_cast_input_and_s():
    """PEFT keeps an fp32 copy of x (4 MK bytes) and S in fp32 (4 M r bytes): the published observation."""
    problem = Problem(block="linear", shape=Shape(M=64, K=32, N=48), dtype=torch.bfloat16)
    layer = single.peft(problem, Adapter(rank=4, dora=False))
    counted = saved.count(layer.forward, [*saved.state_of(layer.root), layer.x])
    assert counted == (4 * 64 * 32 + 4 * 64 * 4,) * 2


def _peft(adapter):
    base, ids = TINY.build(torch.bfloat16), TINY.batch_ids()
    return contenders.peft(base, ids, adapter)


def test_peak_of_a_known_run():
    w = torch.randn(100, requires_grad=True)  # 400 bytes, alive before

    def run():
        y = w * 2  # 800
        z = y.exp()  # 1200
        del y  # mul keeps nothing: 800
        z.sum().backward()  # with the sum's 4 bytes, its gradient's 4, and exp's and mul's products

    with peak.PeakBytes([w]) as counter:
        run()
    assert 1600 <= counter.peak <= 1620
    assert w.grad is not None


def test_peak_falls_when_moments_go():
    model = nn.Linear(64, 64, bias=False)

    def contender(optimizer):
        instance = contenders.Contender("x", model, torch.zeros(1), optimizer=optimizer)
        instance.loss = lambda: model(torch.ones(1, 64)).sum()
        return instance.step_bytes()[0]

    with_moments = contender(torch.optim.AdamW(model.parameters(), foreach=False))
    without = contender(torch.optim.SGD(model.parameters(), foreach=False))
    assert with_moments - without >= 2 * 4 * 64 * 64


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_parity_gate_passes_the_same_and_stops_wrong_contenders(dora):
    adapter = Adapter(rank=4, dora=dora)
    peer = _peft(adapter)
    wide = parity.truth(peer, torch.float32)
    right = parity.outcome(peer)
    assert parity.failure(parity.compare(wide, right, parity.outcome(_peft(adapter)), torch.bfloat16)) is None

    wrong_scale = _peft(adapter)
    with torch.no_grad():
        for name, parameter in wrong_scale.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    reason = parity.failure(parity.compare(wide, right, parity.outcome(wrong_scale), torch.bfloat16))
    assert reason is not None
    assert "is allowed" in reason

    no_gradients = parity.outcome(_peft(adapter))
    for group in no_gradients.groups:
        if "gradient" in group:
            no_gradients.groups[group] = {k: torch.zeros_like(v) for k, v in right.groups[group].items()}
    reason = parity.failure(parity.compare(wide, right, no_gradients, torch.bfloat16))
    assert reason is not None
    assert reason.startswith("gradient")

    not_a_number = parity.outcome(_peft(adapter))
    not_a_number.groups["logits"] = {"logits": right.groups["logits"]["logits"] * float("nan")}
    assert parity.failure(parity.compare(wide, right, not_a_number, torch.bfloat16)) is not None


def test_step_prints_no_speed_for_a_wrong_contender(monkeypatch, capsys):
    def copy_nothing(source, target):
        """The contender keeps its own weights, so it computes something else."""

    monkeypatch.setattr(adapter_files, "copy", copy_nothing)
    words = ["step", "--model", "tiny", "--ranks", "4", "--rounds", "1", "--warmup", "1", *ONE_THREAD]
    assert bench_cli.main([*words, "--contenders", "peft-lora", "fastpeft-lora"]) == 1
    out = capsys.readouterr().out
    assert "fastpeft-lora is not timed: parity: " in out
    (row,) = [line for line in out.splitlines() if "fastpeft-lora" in line and "│" in line]
    assert not any(character.isdigit() for character in row)
    assert [line for line in out.splitlines() if "│ peft-lora" in line and " ±" in line]


def test_step_end_to_end(tmp_path, capsys):
    target = tmp_path / "step.json"
    words = ["step", "--model", "tiny", "--ranks", "4", "--rounds", "2", "--warmup", "1", *ONE_THREAD]
    words += ["--period", "2"]
    assert bench_cli.main([*words, "--json", str(target)]) == 0
    assert "tokens/s" in capsys.readouterr().out
    text = target.read_text()
    assert str(tmp_path) not in text
    document = json.loads(text)
    assert document["command"] == "python -m bench " + " ".join(words)
    assert document["machine"]["torch"].startswith(torch.__version__.partition("+")[0])
    results = {row["contender"]: row for row in document["results"]}
    assert list(results) == list(step.CORE)
    for row in results.values():
        assert row["blocked"] is None
        assert [len(seconds) for seconds in row["seconds"].values()] == [2, 2, 2, 2]
        assert row["peak_bytes"] > row["saved_bytes"] > 0
    for method in ("lora", "dora"):
        assert results[f"fastpeft-{method}"]["saved_bytes"] < results[f"peft-{method}"]["saved_bytes"]
        assert results[f"fastpeft-{method}"]["parity"]


def test_layers_memory_and_profile_end_to_end(capsys):
    shape = (
        "--peers",
        "none",
        "--shapes",
        "32x24x40",
        "--ranks",
        "4",
        "--dtypes",
        "bfloat16",
        "float32",
        "--dropout",
        "0.1",
    )
    assert bench_cli.main(["layers", *shape, "--rounds", "2", *ONE_THREAD]) == 0
    assert (
        bench_cli.main(
            [
                "memory",
                "--shape",
                "32x24x40",
                "--model",
                "tiny",
                "--rank",
                "4",
                "--dropout",
                "0.1",
                *ONE_THREAD,
            ]
        )
        == 0
    )
    assert (
        bench_cli.main(
            ["profile", "--model", "tiny", "--rank", "8", "--contenders", "fastpeft-dora", *ONE_THREAD]
        )
        == 0
    )
    out = capsys.readouterr().out
    for word in ("mlp 32x24x40 (tokens x in x out), float32, r=4, dropout 0.1", "saved MiB", "adapter GEMMs",
                 "fastpeft-dora, qkv, float32, dropout 0.1"):  # fmt: skip
        assert word in out
    assert "not timed" not in out
    assert "not counted" not in out


def test_default_layers_are_the_documented_list():
    default = layers.parser().parse_args([])
    assert default.shapes is None
    assert layers.SHAPES["linear"] == ("512x1024x1024", "1024x2048x2048", "256x4096x4096", "2048x1024x4096")
    assert set(layers.SHAPES) == set(default.blocks) == {"linear", "qkv", "mlp"}
    assert (default.ranks, default.dtypes, default.dropout) == ([16, 64], ["bfloat16", "float32"], [0.0])


def test_command_line_help_and_wrong_use(capsys, tmp_path):
    assert bench_cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(suite in text for suite in bench_cli.SUITES)
    assert bench_cli.main(["nonsense"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unknown suite 'nonsense'" in error
    for words, said in (
        (["step", "--ranks", "0"], "at least 1, received 0"),
        (["layers", "--shapes", "3x4"], "expected MxKxN"),
        (["layers", "--dropout", "1"], "received 1"),
        (["step", "--model", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["layers", "--device", "tpu"], "no such device here: tpu"),
        (["layers", "--peers", "unsloth"], "unsloth cannot run here: unsloth's kernels need a GPU"),
        (["step", "--contenders", "loralib-dora"], "loralib has no DoRA"),
        (["sparse", "--model", "tiny", "--layers", "3"], "tiny has 2 blocks"),
        (["memory", "--json", str(tmp_path / "absent" / "x.json")], "absent is not a folder"),
        (["memory", "--compare", __file__], "not a results file"),
        (["profile", "--model", "tiny", "--rank", "64"], "is a dimension of tiny"),
        (["--fuller"], "unknown option --fuller"),
    ):
        with pytest.raises(SystemExit) as stop:
            bench_cli.main(words)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert said in error


def test_every_suite_documents_its_options():
    for module in (step, layers, memory, profile_step, sparse, optimizer, patch, self_check):
        text = module.parser().format_help()
        actions = [action for action in module.parser()._actions if action.option_strings]
        assert all(action.help for action in actions)
        assert all(word in text for word in ("--json", "--save", "--compare", "--plot", "--threads"))


def test_workload_shapes():
    config = models.WORKLOADS["smollm2-135m"]
    with torch.device("meta"):
        model = config.build(torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # SmolLM2-135M's own count
    assert report.command_line("step", ["--json", "x", "--ranks", "4"]) == "python -m bench step --ranks 4"
    assert isinstance(model, nn.Module)
