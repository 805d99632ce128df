"""Other libraries' linears and layer-sparse contenders pass the gate where they should, and only there."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from bench import __main__ as bench_cli
from bench import (
    adapter_files,
    contenders,
    gpu_peers,
    layer_sparse,
    modelled,
    models,
    parity,
    peer_linears,
    single,
)
from bench.adapter import Adapter
from bench.blocks import BLOCKS, Problem, Shape

TINY = models.WORKLOADS["tiny"]
SHAPE = Shape(M=16, K=24, N=40)
PEERS = [
    (name, dora)
    for name, peer in peer_linears.PEERS.items()
    for dora in (False, True)
    if ("dora" if dora else "lora") in peer.methods
]


def _problem(block="linear", dtype=torch.float32):
    return Problem(block=block, shape=SHAPE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("name", "dora"), PEERS)
def test_peers_compute_what_peft_computes(name, dora, block, dtype):
    adapter = Adapter(rank=4, dora=dora)
    if reason := peer_linears.missing(name, adapter.method):
        pytest.skip(reason)
    layer = single.peer(name, _problem(block, dtype), adapter)
    assert parity.failure(single.check(layer, _problem(block, dtype), adapter)) is None


@pytest.mark.parametrize("block", BLOCKS)
def test_a_wrong_peer_is_stopped(block, monkeypatch):
    class Wrong(peer_linears.PlainLinear):
        def __init__(self, base, adapter):
            super().__init__(base, adapter)
            self.scaling *= 1.01

    peer = peer_linears.PEERS["plain"]
    wrong = peer_linears.PeerLinear(package=None, methods=peer.methods, make=Wrong, parts=peer.parts)
    monkeypatch.setitem(peer_linears.PEERS, "plain", wrong)
    adapter = Adapter(rank=4, dora=False)
    layer = single.peer("plain", _problem(block), adapter)
    assert "is allowed" in parity.failure(single.check(layer, _problem(block), adapter))


def test_adapters_travel_between_sides_under_pefts_keys(tmp_path):
    adapter = Adapter(rank=4, dora=True)
    peft = single.peft(_problem("qkv"), adapter)
    plain = single.peer("plain", _problem("qkv"), adapter)
    back = single.fastpeft(_problem("qkv"), Adapter(rank=4, dora=True))
    with torch.no_grad():
        for parameter in plain.trainable:
            parameter.add_(1)
    adapter_files.copy(plain.root, peft.root)
    adapter_files.copy(peft.root, back.root)
    plain.save(tmp_path)
    peft.save(tmp_path / "peft")
    from safetensors.torch import load_file

    ours = load_file(tmp_path / adapter_files.WEIGHTS)
    assert ours.keys() == load_file(tmp_path / "peft" / adapter_files.WEIGHTS).keys()
    back.save(tmp_path / "back")
    read = load_file(tmp_path / "back" / adapter_files.WEIGHTS)
    assert all(torch.equal(value, read[key]) for key, value in ours.items())
    with pytest.raises(ValueError, match="adapters differ"):
        adapter_files.load(single.peer("plain", _problem("mlp"), adapter).root, tmp_path)


def test_install_refuses_what_is_no_linear():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(TypeError, match=r"0: expected an nn\.Linear, found ReLU"):
        peer_linears.install(model, "plain", Adapter(rank=2, dora=False), ["0"])


def test_gpu_peers_say_why_they_cannot_run():
    cpu = torch.device("cpu")
    for name in ("unsloth", "axolotl", "liger"):
        assert gpu_peers.missing(name, "lora", cpu) == f"{name}'s kernels need a GPU"
    with pytest.raises(RuntimeError, match="need a GPU"):
        single.gpu_peer("unsloth", _problem(), Adapter(rank=4, dora=False))


@pytest.mark.parametrize("name", layer_sparse.METHODS)
def test_layer_sparse_contenders_are_torchs_adamw_at_first(name):
    base, ids = TINY.build(torch.float32), TINY.batch_ids()
    settings = layer_sparse.Settings(layers=1, period=2, rank=4)
    ours, theirs = layer_sparse.build(name, base, ids, settings)
    assert ours.step_bytes(2)[1] > 0
    trains = {n for n, p in theirs.model.named_parameters() if p.requires_grad}
    assert len(trains) < len(list(theirs.model.named_parameters()))


def test_a_layer_sparse_contender_with_other_losses_is_stopped(monkeypatch):
    base, ids = TINY.build(torch.float32), TINY.batch_ids()
    losses = iter(range(10))
    monkeypatch.setattr(layer_sparse, "_one_step", lambda contender: next(losses))
    with pytest.raises(RuntimeError, match="torch's AdamW on the same blocks"):
        layer_sparse.build("lisa", base, ids, layer_sparse.Settings(layers=1, period=2, rank=4))


def test_lisas_peak_is_below_full_fine_tunings_by_the_inactive_moments():
    base, ids = TINY.build(torch.float32), TINY.batch_ids()
    settings = layer_sparse.Settings(layers=1, period=2, rank=4)
    lisa, _ = layer_sparse.build("lisa", base, ids, settings)
    full = contenders.full(base, ids)
    (full_peak, full_moments), (peak, moments) = full.step_bytes(), layer_sparse.step_bytes(lisa, settings)
    assert full_moments > moments > 0
    assert full_peak - peak >= full_moments - moments


def test_sparse_optimizer_and_patch_end_to_end(tmp_path):
    tiny = ["--model", "tiny", "--rounds", "2", "--warmup", "1", "--threads", "1"]
    target = tmp_path / "x.json"
    words = [
        "sparse",
        *tiny,
        "--dtype",
        "float32",
        "--layers",
        "1",
        "--period",
        "2",
        "--peft-ranks",
        "4",
        "8",
    ]
    assert bench_cli.main([*words, "--json", str(target)]) == 0
    found = {row["contender"]: row for row in json.loads(target.read_text())["results"]}
    assert list(found) == ["full", "hand-frozen", *layer_sparse.METHODS, "peft-lora r=4", "peft-lora r=8"]
    assert found["lisa"]["moments_bytes"] < found["full"]["moments_bytes"]
    assert bench_cli.main(["optimizer", *tiny, "--layers", "1", "--json", str(target)]) == 0
    found = {row["contender"]: row for row in json.loads(target.read_text())["results"]}
    ours = {name: row for name, row in found.items() if not name.startswith("galore")}
    assert len(ours) == 7
    assert all(len(row["seconds"]["step"]) == 2 for row in ours.values())
    assert bench_cli.main(["patch", *tiny, "--json", str(target)]) == 0
    assert len(json.loads(target.read_text())["results"]) == 6


def test_modelled_time_is_the_roofline_of_the_formula():
    shape = Shape(M=8192, K=4096, N=4096)
    gpu = modelled.GPUS["h100"]
    found = modelled.seconds("h100", "linear", shape, "bfloat16", ["frozen", "peft-lora", "fastpeft-lora"])
    flops = 2 * 2 * 8192 * 4096 * 4096
    assert found["frozen"] == pytest.approx(flops / gpu.rate)  # bound by the tensor cores at this size
    assert found["frozen"] < found["fastpeft-lora"] < found["peft-lora"]
    few = Shape(M=1, K=4096, N=4096)
    bytes_moved = 2 * 2 * (4096 + 4096 * 4096 + 4096)
    found = modelled.seconds("h100", "linear", few, "bfloat16", ["frozen"])
    assert found["frozen"] == pytest.approx(bytes_moved / gpu.bandwidth)  # bound by memory
    assert not modelled.seconds("h100", "linear", shape, "float32", ["frozen"])
    assert not modelled.seconds(None, "linear", shape, "bfloat16", ["frozen"])
