"""The planner: what it says of a step is what the step does, byte for byte."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import sys
from functools import partial

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, GPT2Config, LlamaConfig, LlamaForCausalLM

import fastpeft
from fastpeft import IST, LISA, BAdam, LoRA, TopK
from fastpeft.__main__ import main as command
from fastpeft.errors import ConfigError
from fastpeft.ops.eager import seen_through
from fastpeft.planning import methods
from fastpeft.planning.building import meta_model
from fastpeft.planning.fitting import largest_that_fits, parse_bytes
from fastpeft.planning.optimizers import Places, Turns, make
from fastpeft.planning.step import KINDS, PHASES, train
from fastpeft.planning.tracking import Tracker

BATCH, SEQUENCE = 3, 40  # more tokens than fastpeft's path for a few serves


def config(layers=3, **options):
    return LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
            "use_cache": False,
            **options,
        }
    )


def real_model(layers=3, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return LlamaForCausalLM(config(layers, **options)).to(dtype).train()


def measured(model, method, optimizer="adamw", active=None):
    """The same step on real tensors."""
    method = methods.parse(method)
    method.prepare(model)
    turns = None
    if method.schedule is not None:
        places = Places(sets=(frozenset(active),))
        turns = Turns(places, tuple(sorted(method.schedule.always_on)), method.schedule.on_deactivate)
    ids = torch.randint(0, 64, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    with seen_through():
        return train(model, ids, partial(make, optimizer, turns=turns, device="cpu"), without_values=False)


def assert_same(plan, usage):
    totals = {kind: usage.total(kind) for kind in KINDS}
    assert {kind: getattr(plan, kind) for kind in KINDS} == totals
    peaks = {p: max(peak.bytes for r, peak in usage.peaks.items() if r.phase == p) for p in PHASES}
    assert plan.peaks == peaks
    assert plan.peak == max(peaks.values())


FP32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "full": ("full", "adamw", BF16, {}),
    "full-tied": ("full", "adamw-bf16-moments", BF16, {"tie_word_embeddings": True}),
    "full-fused": ("full", "adamw-fused", FP32, {}),
    "full-stochastic": ("full", "adamw-stochastic", BF16, {}),
    "lora": (LoRA(r=4), "adamw", BF16, {}),
    "lora-fp32": (LoRA(r=4), "adamw", FP32, {}),
    "lora-dropout": (LoRA(r=4, lora_dropout=0.1), "adamw", BF16, {}),
    "lora-head": (LoRA(r=4, modules_to_save=("lm_head",)), "adamw", BF16, {}),
    "dora": (LoRA(r=4, use_dora=True), "adamw", BF16, {}),
    "dora-fp32": (LoRA(r=4, use_dora=True), "adamw", FP32, {}),
    "lisa": (LISA(layers=2), "adamw", BF16, {}),
    "badam": (BAdam(), "adamw-fp32-masters", BF16, {}),
    "topk": (TopK(layers=1), "sgd-momentum", FP32, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_a_real_step_to_the_byte(case):
    method, optimizer, dtype, options = CASES[case]
    plan = fastpeft.plan(real_model(dtype=dtype, **options), method, BATCH, SEQUENCE, optimizer=optimizer)
    assert plan.setting.device == "cpu"
    names = plan.setting.active_blocks
    active = None if names is None else [int(name.rpartition(".")[2]) for name in names]
    assert_same(plan, measured(real_model(dtype=dtype, **options), method, optimizer, active))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_is_a_real_step_to_the_byte(method):
    plan = fastpeft.plan(real_model(), method, BATCH, SEQUENCE, checkpointing=True)
    model = real_model()
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    assert_same(plan, measured(model, method))
    assert plan.activations < fastpeft.plan(real_model(), method, BATCH, SEQUENCE).activations / 2


def test_a_prepared_model_is_planned_as_it_is():
    def prepared():
        model = fastpeft.patch(real_model(), LoRA(r=4, target_modules=["q_proj", "down_proj"]))
        model.get_submodule("model.layers.0").requires_grad_(False)
        return model

    model = prepared()
    before = {name: (p, p._version, p.requires_grad) for name, p in model.named_parameters()}
    plan = fastpeft.plan(model, None, BATCH, SEQUENCE)
    after = {name: (p, p._version, p.requires_grad) for name, p in model.named_parameters()}
    assert all(before[name][0] is after[name][0] for name in before)
    assert [entry[1:] for entry in before.values()] == [entry[1:] for entry in after.values()]
    assert_same(plan, measured(prepared(), None))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {"optimizer": "adamw-fp32-masters"}),
        ("dora:3", {}),
        ("lora:3", {"checkpointing": True}),
        ((LoRA(r=3), LISA(layers=2)), {}),
        (IST(layers=7), {"rank": 2}),
        ("badam", {}),
    ],
    ids=["full", "dora", "checkpointing", "lisa-of-adapters", "ist", "badam"],
)
def test_depth_is_extended_exactly(method, options):
    quick, exact = (
        fastpeft.plan(config(13), method, BATCH, SEQUENCE, device="cuda", exact_depth=deep, **options)
        for deep in (False, True)
    )
    assert quick == exact
    assert len(quick.layers) >= 13


def test_depth_is_extended_exactly_on_a_cpu():
    quick, exact = (
        fastpeft.plan(config(6), "dora:2", BATCH, SEQUENCE, device="cpu", exact_depth=deep)
        for deep in (False, True)
    )
    assert quick == exact
    assert quick.caches > 0


def test_blocks_of_two_kinds_are_told_apart():
    model = meta_model(config(12), None, None)
    for place in range(5, 12):
        layer = model.model.layers[place]
        layer.mlp.down_proj = nn.Linear(48, 32, bias=True, device="meta")
    quick, exact = (fastpeft.plan(model, "full", BATCH, SEQUENCE, exact_depth=deep) for deep in (False, True))
    assert quick == exact
    assert quick.layers["model.layers.4"]["weights"] < quick.layers["model.layers.5"]["weights"]


@pytest.mark.parametrize("always_on", [("embeddings", "norms", "head", "other"), ("norms", "head")])
def test_the_planned_blocks_are_the_most_expensive_ones(always_on):
    class Pinned(LISA):
        pass

    Pinned.always_on = always_on
    layers = 4
    plan = fastpeft.plan(config(layers), Pinned(layers=2), BATCH, SEQUENCE, device="cuda")
    peaks = {}
    for chosen in itertools.combinations(range(layers), 2):
        model = meta_model(config(layers), None, None)
        for i, block in enumerate(model.model.layers):
            block.requires_grad_(i in chosen)
        if "embeddings" not in always_on:
            model.get_input_embeddings().requires_grad_(False)
        peaks[chosen] = fastpeft.plan(model, None, BATCH, SEQUENCE, optimizer="adamw").peak
    names = plan.setting.active_blocks
    assert names is not None
    chosen = tuple(int(name.rpartition(".")[2]) for name in names)
    assert peaks[chosen] == max(peaks.values()) == plan.peak
    assert min(peaks.values()) < plan.peak or "embeddings" in always_on


GB = 1e9
# From the table of simulated components for LLaMA-2-7B, batch 1, sequence 1024, bf16 throughout, SDPA.
LLAMA_7B = {
    "full": ("full", 13.48, 13.48, 26.95, 6.34),
    "E+H": (None, 13.48, 0.52, 1.05, 4.55),
    "E+H+2L": ("lisa:2", 13.48, 1.33, 2.67, 4.66),
    "E+H+4L": ("lisa:4", 13.48, 2.14, 4.29, 4.77),
}


@pytest.mark.parametrize("row", LLAMA_7B)
def test_llama_7b_is_as_simulated_before(row):
    method, *expected = LLAMA_7B[row]
    shape = config(
        32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32,
        vocab_size=32000, max_position_embeddings=4096,
    )  # fmt: skip
    source = meta_model(shape, BF16, None)
    if row == "E+H":
        source.model.layers.requires_grad_(False)
    plan = fastpeft.plan(source, method, 1, 1024, optimizer="adamw-loop")
    found = [plan.weights / GB, plan.gradients / GB, plan.optimizer_state / GB, plan.activations / GB]
    assert found == pytest.approx(expected, rel=0.1)
    assert plan.peak < sum(found) * GB


def test_parts_add_up():
    plan = fastpeft.plan(config(8), "lora:2", BATCH, SEQUENCE)
    assert sum(plan.at_peak.values()) == plan.peak == max(plan.peaks.values())
    assert plan.peak == plan.peaks[plan.peak_phase]
    for kind in KINDS:
        assert sum(found.get(kind, 0) for found in plan.layers.values()) == getattr(plan, kind)
    blocks = [f"model.layers.{i}" for i in range(8)]
    assert [path for path in plan.layers if path in blocks] == blocks
    assert len({tuple(sorted(plan.layers[b].items())) for b in blocks[1:-1]}) == 1
    assert "peak" in str(plan)


def test_gpu_attention_saves_no_square():
    """Flash attention on a GPU: activations grow with the sequence, not with its square."""
    sizes = [fastpeft.plan(config(2), "full", 1, s, "bf16").activations for s in (256, 512, 1024)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)
    eager = fastpeft.plan(config(2), "full", 1, 1024, "bf16", attention="eager").activations
    assert eager > sizes[2] + 2 * 1024 * 1024 * 2 * 2


def test_optimizers_keep_what_they_say():
    def state(name):
        return fastpeft.plan(config(2), "full", 1, 8, "bf16", optimizer=name).optimizer_state

    n = sum(p.numel() for p in meta_model(config(2), None, None).parameters())
    steps = 4 * len(list(meta_model(config(2), None, None).parameters()))
    assert state("adamw") == state("AdamW fused") == 2 * 2 * n + steps
    assert state("adamw-fp32-masters") == 3 * 4 * n + steps
    assert state("adamw-fp32-moments") == 2 * 4 * n + steps
    assert (state("sgd"), state("sgd-momentum")) == (0, 2 * n)
    given = fastpeft.plan(
        config(2), "full", 1, 8, "bf16", optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0)
    )
    assert given.optimizer_state == 0


def test_what_fits():
    model = meta_model(config(3, max_position_embeddings=128), None, None)

    def peak(**options):
        return fastpeft.plan(model, "lora:2", **{"batch": 2, "sequence": 32, **options}).peak

    for largest in ("batch", "rank"):
        limit = peak(**{largest: 23}) + 100
        found = fastpeft.plan(model, "lora:2", 2, 32, fits_in=limit, largest=largest)
        assert getattr(found.setting, largest) == 23
        assert found.peak == limit - 100
    limit = fastpeft.plan(model, LISA(layers=2), 2, 32).peak
    assert fastpeft.plan(model, LISA(), 2, 32, fits_in=limit, largest="layers").setting.layers == 2
    everything = fastpeft.plan(model, "lora:2", 1, 32, fits_in="1GiB", largest="sequence")
    assert everything.setting.sequence == 128
    with pytest.raises(ConfigError, match="nothing fits: batch 1 needs"):
        fastpeft.plan(model, "lora:2", fits_in="10KiB")


@dataclasses.dataclass
class Peak:
    peak: int


@pytest.mark.parametrize("power", [1, 2])
def test_bisection_finds_the_largest_in_few_steps(power):
    tried = []

    def at(value):
        tried.append(value)
        return Peak(1000 + value**power)

    for limit in (1001, 1500, 10**6, 10**9):
        tried.clear()
        found = largest_that_fits(at, limit, "batch").peak
        assert found <= limit < 1000 + (round((found - 1000) ** (1 / power)) + 1) ** power
        assert len(tried) < 25
    assert largest_that_fits(at, 10**9, "layers", bound=7).peak == 1000 + 7**power


def test_sizes_are_read():
    assert [parse_bytes(s) for s in (5, "24GiB", "80 GB", "1.5kib")] == [5, 24 * 2**30, 80 * 10**9, 1536]
    for wrong in (0, -1, True, "", "GiB", "-3GiB", "24 parsecs", None):
        with pytest.raises(ConfigError, match="expected a size"):
            parse_bytes(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "qlora"}, "method: expected one of full, lora"),
        ({"method": 7}, "method: expected one of"),
        ({"method": "full:3"}, "method: expected"),
        ({"method": "full", "rank": 4}, "rank: full has no rank"),
        ({"method": "lora", "layers": 4}, "layers: LoRA r=16 does not choose"),
        ({"method": "lora:0"}, "r: expected"),
        ({"method": "lisa:99"}, "LISA.layers: expected at most 2"),
        ({"batch": 0}, "batch: expected a whole number of at least 1, got 0"),
        ({"sequence": -5}, "sequence: expected"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda"),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw"),
        ({"attention": "magic"}, "no causal language model"),
        ({"fits_in": "much"}, "expected a size"),
        ({"fits_in": "1GiB", "largest": "depth"}, "largest: expected one of"),
    ],
)
def test_wrong_use_is_one_error(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        fastpeft.plan(config(2), **arguments)
    assert "\n" not in str(error.value)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        fastpeft.plan(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        fastpeft.plan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match="transformers cannot read"):
        fastpeft.plan(tmp_path)
    with pytest.raises(ConfigError, match="expected a model, a transformers configuration, or a folder"):
        fastpeft.plan(3)
    with pytest.raises(ConfigError, match="no parameter of the model trains"):
        fastpeft.plan(meta_model(config(2), None, None).requires_grad_(False))
    with pytest.raises(ConfigError, match="no causal language model"):
        fastpeft.plan(CLIPConfig())


def test_a_model_that_cannot_run_without_values_is_one_error():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

        def forward(self, input_ids, labels):
            raise RuntimeError("Cannot copy out of meta tensor; no data!")

    with pytest.raises(ConfigError, match=r"Reads cannot be run without values: .*no data"):
        fastpeft.plan(Reads(), "full", device="cuda")


def test_nothing_is_left_behind():
    before = (nn.Module.__call__, gc.isenabled(), fastpeft.get_backend())
    model = real_model()
    fastpeft.plan(model, "dora:2", 1, 8)
    with pytest.raises(ConfigError):
        fastpeft.plan(model, "lisa:9", 1, 8)
    assert (nn.Module.__call__, gc.isenabled(), fastpeft.get_backend()) == before
    assert all(p.grad is None and p.requires_grad and not p.is_meta for p in model.parameters())


def test_the_tracker_follows_views_and_deaths():
    tracker = Tracker(nn.Identity())
    with tracker:
        tracker.enter("forward")
        a = torch.zeros(10)
        view = a[:5]
        b = a + 1
        assert tracker.live == 80
        del a, b
        assert tracker.live == 40
        del view
        assert tracker.live == 0
    assert max(peak.bytes for peak in tracker.peaks().values()) == 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config(2).save_pretrained(path)
    return path


def test_command_prints_methods_side_by_side(folder, capsys):
    words = ["plan", str(folder), "--methods", "full", "lora:2", "--sequence", "16", "--layers-table"]
    assert command(words) == 0
    out = capsys.readouterr().out
    assert "full" in out
    assert "LoRA r=2" in out
    assert "model.layers.1" in out


def test_command_finds_what_fits_and_writes_json(folder, capsys, tmp_path):
    file = tmp_path / "plan.json"
    words = ["plan", str(folder), "--methods", "lora:2", "--sequence", "16", "--fit", "1MiB", "batch"]
    assert command([*words, "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text())
    assert f"fits in 1MiB is {found['setting']['batch']}" in capsys.readouterr().out
    assert found["peak"] <= 2**20
    assert found["setting"]["dtype"] == "float32"


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "/no/such/folder"],
        ["plan", "FOLDER", "--methods", "qlora"],
        ["plan", "FOLDER", "--batch", "-1"],
        ["plan", "FOLDER", "--optimizer", "lion"],
        ["plan", "FOLDER", "--fit", "24", "depth"],
        ["guess"],
    ],
)
def test_wrong_use_of_the_command_is_one_line_and_2(words, folder, capsys):
    assert command([str(folder) if word == "FOLDER" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m fastpeft")
    assert error.count("\n") == 1


def test_without_transformers_a_model_can_be_planned_and_a_config_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers: pip install 'fastpeft\[transformers\]'"):
        fastpeft.plan("folder")


def test_gpt2_with_dropout_and_learned_positions():
    small = GPT2Config(n_embd=32, n_layer=7, n_head=2, vocab_size=64, n_positions=64)
    plan = fastpeft.plan(small, "full", 2, 32)
    still = GPT2Config(
        n_embd=32, n_layer=7, n_head=2, vocab_size=64, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0
    )
    # A byte of mask an element, after attention, after the MLP, and after the embeddings.
    masks = (2 * 7 + 1) * 2 * 32 * 32
    dropped = plan.activations - fastpeft.plan(still, "full", 2, 32).activations
    assert dropped == pytest.approx(masks, rel=0.5)


def test_a_storage_that_is_resized_in_place_counts_by_its_size():
    tracker = Tracker(nn.Identity())
    with tracker:
        tracker.enter("forward")
        a = torch.zeros(10)
        a.untyped_storage().resize_(400)
        b = a.view(10)
        assert tracker.live == 400
        a.untyped_storage().resize_(0)
        b.view(10)
        assert tracker.live == 0
        del a, b
        assert tracker.live == 0
    assert max(peak.bytes for peak in tracker.peaks().values()) == 400
    assert tracker.journal() == [40, 360, -400, 0]
