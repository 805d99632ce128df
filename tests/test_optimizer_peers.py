"""GaLore and LOMO, from their packages: planned to the byte, gated before they are timed."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

import fastpeft
from bench import __main__ as bench_cli
from bench import models, optimizer_peers
from fastpeft import TopK
from fastpeft.errors import ConfigError
from fastpeft.planning import peers
from tests.test_plan import BATCH, SEQUENCE, assert_same, config, measured, real_model

TINY = models.WORKLOADS["tiny"]


def needs(name):
    return pytest.mark.skipif(peers.missing(name) is not None, reason=str(peers.missing(name)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", [pytest.param("galore:4", marks=needs("galore")), pytest.param("lomo", marks=needs("lomo"))]
)
def test_a_plan_is_a_real_step_to_the_byte(name, dtype):
    plan = fastpeft.plan(real_model(dtype=dtype), "full", BATCH, SEQUENCE, optimizer=name)
    assert_same(plan, measured(real_model(dtype=dtype), "full", name))


@needs("galore")
def test_galores_moments_are_of_its_rank():
    model = real_model()
    linears = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    for dtype in (torch.bfloat16, torch.float32):
        plans = {
            r: fastpeft.plan(real_model(), "full", 1, 8, dtype, optimizer=f"galore:{r}").optimizer_state
            for r in (1, 2)
        }
        # One more of the rank: two moments of the longer side, and a singular vector of the shorter one; of
        # an fp32 gradient's the package keeps a view of all of them, whatever the rank.
        vectors = sum(min(p.shape) for p in linears) if dtype is torch.bfloat16 else 0
        moments = sum(2 * max(p.shape) for p in linears)
        assert plans[2] - plans[1] == dtype.itemsize * (moments + vectors)
    assert plans[2] < fastpeft.plan(real_model(), "full", 1, 8).optimizer_state
    found = fastpeft.plan(real_model(), TopK(layers=1), 1, 8, optimizer="galore:2")
    assert 0 < found.optimizer_state < plans[2]
    quick, exact = (
        fastpeft.plan(config(7), "full", 1, 8, optimizer="galore:2", exact_depth=deep)
        for deep in (False, True)
    )
    assert quick == exact


@needs("lomo")
def test_lomo_holds_no_state_and_never_two_gradients_of_any_size():
    plan = fastpeft.plan(config(7), "full", 1, 8, optimizer="lomo")
    assert plan == fastpeft.plan(config(7), "full", 1, 8, optimizer="LOMO", exact_depth=True)
    assert (plan.optimizer_state, plan.gradients) == (0, 0)
    sgd = fastpeft.plan(config(7), "full", 1, 8, optimizer="sgd")
    assert sgd.gradients == 4 * sgd.setting.parameters
    largest = 4 * 64 * 32  # the embedding's
    # The gradient at hand, the one before, and its fp32 sum.
    assert plan.peaks["backward"] < plan.weights + plan.activations + 4 * largest
    assert plan.peak < sgd.peak
    with pytest.raises(ConfigError, match="lomo has no step for a schedule"):
        fastpeft.plan(config(2), "lisa:1", 1, 8, optimizer="lomo")


def test_a_package_that_is_not_there_is_one_error(monkeypatch):
    for name, (module, package) in peers.PACKAGES.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=f"{name} needs the package {package} .pip install") as error:
            fastpeft.plan(config(2), "full", 1, 8, optimizer=name)
        assert "\n" not in str(error.value)
    for wrong in ("galore:0", "galore:x", "lomo:3", "sgd:2"):
        with pytest.raises(ConfigError, match="optimizer: expected one of adamw"):
            fastpeft.plan(config(2), "full", 1, 8, optimizer=wrong)


@needs("lomo")
def test_lomo_is_sgd_and_a_wrong_one_is_stopped(monkeypatch):
    assert optimizer_peers.lomo_difference() is None
    right = peers.lomo
    monkeypatch.setattr(peers, "lomo", lambda model, lr: right(model, lr=1.001 * lr))
    assert "from torch's SGD" in str(optimizer_peers.lomo_difference())
    with pytest.raises(RuntimeError, match="is off by"):
        optimizer_peers.build("lomo", TINY.build(torch.float32), TINY.batch_ids())


@needs("galore")
def test_galore_is_its_formula_and_a_wrong_one_is_stopped(monkeypatch):
    assert optimizer_peers.galore_difference() is None
    right = peers.galore
    with monkeypatch.context() as patched:
        patched.setattr(peers, "galore", lambda m, rank, lr, gap: right(m, rank, lr=lr, gap=5))
        assert "from its formula" in str(optimizer_peers.galore_difference())
    monkeypatch.setattr(peers, "galore", lambda m, rank, lr, gap: right(m, rank - 1, lr=lr, gap=gap))
    assert "from its formula" in str(optimizer_peers.galore_difference())


@needs("galore")
@needs("lomo")
def test_contenders_train_and_hold_less_than_adamw():
    base, ids = TINY.build(torch.float32), TINY.batch_ids()
    from bench import contenders

    full = contenders.full(base, ids).step_bytes()
    for name in optimizer_peers.PEERS:
        contender = optimizer_peers.build(name, base, ids)
        before = copy.deepcopy(contender.model.state_dict())
        assert set(contender.step()) == {"step", "forward", "backward", "optimizer"}
        after = contender.model.state_dict()
        assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("proj.weight"))
        peak, moments = contender.step_bytes()
        if name == "lomo":  # at the tiny width, GaLore's rank is that of whole matrices
            assert moments == 0
            assert peak < full[0] - full[1]


def test_step_and_optimizer_list_a_peer_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    tiny = ["--model", "tiny", "--rounds", "1", "--warmup", "1", "--threads", "1"]
    target = tmp_path / "x.json"
    assert bench_cli.main(["optimizer", *tiny, "--layers", "1", "--json", str(target)]) == 0
    found = {row["contender"]: row for row in json.loads(target.read_text())["results"]}
    assert "galore needs the package galore-torch" in found["galore"]["blocked"]
    assert "galore is not timed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench_cli.main(["step", *tiny, "--contenders", "galore"])
    assert "galore cannot run here: galore needs the package" in capsys.readouterr().err


@needs("galore")
@needs("lomo")
def test_step_and_sparse_end_to_end(tmp_path):
    tiny = ["--model", "tiny", "--rounds", "1", "--warmup", "1", "--threads", "1", "--dtype", "float32"]
    target = tmp_path / "x.json"
    words = ["step", *tiny, "--ranks", "4", "--contenders", "full", "galore", "lomo", "--json", str(target)]
    assert bench_cli.main(words) == 0
    found = {row["contender"]: row for row in json.loads(target.read_text())["results"]}
    assert list(found) == ["full", "galore", "lomo"]
    assert found["lomo"]["peer"] == "full"
    assert found["lomo"]["moments_bytes"] == 0
    words = ["sparse", *tiny, "--layers", "1", "--period", "2", "--peft-ranks", "--topk-layers", "1", "2"]
    assert bench_cli.main([*words, "--json", str(target)]) == 0
    found = {row["contender"]: row for row in json.loads(target.read_text())["results"]}
    one, two = found["topk k=1"], found["topk k=2"]
    for key in ("saved_bytes", "moments_bytes", "peak_bytes"):
        assert one[key] < two[key]
