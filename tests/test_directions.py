"""DoRA's magnitude and direction of a change, with changes that are known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

import fastpeft
from fastpeft import LoRA, VeRA
from fastpeft.errors import CheckpointError, ConfigError
from fastpeft.instruments import (
    Change,
    changes_between,
    changes_between_folders,
    changes_of,
    correlation,
    directions,
)
from fastpeft.instruments.directions import made
from tests.models import gpt2, llama

TIGHT = 1e-12


@pytest.fixture(autouse=True, params=[2**20, 70], ids=["whole", "in-blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(directions, "_BLOCK", request.param)


@pytest.mark.parametrize("per", ["column", "row"])
def test_a_rotation_turns_by_its_angle_and_keeps_magnitudes(per):
    torch.manual_seed(0)
    angle = 0.3
    N, K = 13, 10
    W = torch.zeros(N, K, dtype=torch.float64)
    W[0, :5] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # vectors within the plane that is rotated
    W[1, 5:] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    turn = torch.eye(N, dtype=torch.float64)
    cos, sin = math.cos(angle), math.sin(angle)
    turn[:2, :2] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    before, after = (W, turn @ W) if per == "column" else (W.t(), (turn @ W).t())
    found = made("layers.3.q_proj", before, after, per)
    assert (found.path, found.layer, found.kind) == ("layers.3.q_proj", 3, "q_proj")
    assert found.magnitude == pytest.approx(0.0, abs=TIGHT)
    assert found.direction == pytest.approx(1 - math.cos(angle), abs=TIGHT)


@pytest.mark.parametrize("per", ["column", "row"])
def test_a_scaling_changes_magnitudes_alone_and_the_other_axis_sees_more(per):
    torch.manual_seed(0)
    W = torch.randn(11, 7, dtype=torch.float64)
    factors = torch.rand(7 if per == "column" else 11, dtype=torch.float64) + 0.5
    after = W * (factors if per == "column" else factors[:, None])
    lengths = W.norm(dim=0 if per == "column" else 1)
    found = made("w", W, after, per)
    assert found.magnitude == pytest.approx(((factors - 1) * lengths).abs().mean().item(), rel=TIGHT)
    assert found.direction == pytest.approx(0.0, abs=TIGHT)
    other = made("w", W, after, "row" if per == "column" else "column")
    assert other.direction > 1e-3


def test_opposite_right_angles_and_zero():
    W = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    V = torch.tensor([[-1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    # Opposite: 2; out of nothing: 1; nothing: 0; at right angles: 1.
    assert made("w", W, V, "column").direction == pytest.approx((2 + 1 + 0 + 1) / 4)
    assert made("w", W, V, "column").magnitude == pytest.approx((0 + 3 + 0 + 0) / 4)
    assert made("w", W, V, "column").layer is None
    with pytest.raises(ConfigError, match="w: expected finite weights"):
        made("w", W, V / 0, "column")
    with pytest.raises(ConfigError, match=r"w: expected two weights .* got \[2, 4\] and \[4, 2\]"):
        made("w", W, V.t(), "column")


def by_hand(before, after, per):
    dim = 0 if per == "column" else 1
    a, b = before.double(), after.double()
    dm = (b.norm(dim=dim) - a.norm(dim=dim)).abs().mean()
    dd = (1 - nn.functional.cosine_similarity(a, b, dim=dim)).mean()
    return dm.item(), dd.item()


def assert_is(found: Change, before, after, per, tolerance=1e-5):
    dm, dd = by_hand(before, after, per)
    assert dm > 1e-4
    assert dd > 1e-4
    assert found.magnitude == pytest.approx(dm, rel=tolerance)
    assert found.direction == pytest.approx(dd, rel=tolerance)


def moved(model):
    """A copy whose weights all moved."""
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return other


@pytest.mark.parametrize("per", ["column", "row"])
def test_between_two_models(per):
    before = llama()
    after = moved(before)
    found = changes_between(before, after, per=per)
    assert len(found) == 2 * 7
    assert {c.layer for c in found} == {0, 1}
    for c in found:
        assert_is(c, before.get_submodule(c.path).weight, after.get_submodule(c.path).weight, per)
    chosen = changes_between(before, after, names=["q_proj", "lm_head"], per=per)
    assert [c.kind for c in chosen] == ["q_proj", "q_proj", "lm_head"]
    assert [c for c in found if c.kind == "q_proj"] == chosen[:2]


ADAPTERS = {
    "lora": LoRA(r=3, init_lora_weights=False),
    "dora": LoRA(r=3, init_lora_weights=False, use_dora=True),
    "vera": VeRA(r=5, init_weights=False),
    "pissa": LoRA(r=3, init_lora_weights="pissa"),
}


@pytest.mark.parametrize("per", ["column", "row"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_of_a_patched_model(method, per):
    base = llama()
    model = fastpeft.patch(copy.deepcopy(base), ADAPTERS[method])
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p) * (1 + p.abs()))
    found = changes_of(model, per=per)
    assert changes_between(base, model, per=per) == found
    merged = fastpeft.merge(copy.deepcopy(model))
    for c in found:
        assert_is(c, base.get_submodule(c.path).weight, merged.get_submodule(c.path).weight, per, 1e-3)
    of_merged = changes_of(merged, per=per) if method != "pissa" else found
    for c, d in zip(found, of_merged, strict=True):
        assert (c.path, d.magnitude) == (d.path, pytest.approx(c.magnitude, rel=1e-3, abs=1e-6))
    with fastpeft.disable_adapters(model) if method != "pissa" else torch.no_grad():
        still = changes_of(model, per=per)
    assert all(c.magnitude == 0 for c in still) == (method != "pissa")


def test_of_conv1d_whose_weight_is_transposed():
    base = gpt2()
    model = fastpeft.patch(copy.deepcopy(base), LoRA(r=3, init_lora_weights=False))
    (found, *_) = changes_of(model, names=["attn.c_attn"])
    merged = fastpeft.merge(copy.deepcopy(model)).get_submodule(found.path).weight
    assert_is(found, base.get_submodule(found.path).weight.t(), merged.t(), "column")
    assert changes_between(base, model, names=["attn.c_attn"])[0] == found
    assert changes_of(fastpeft.merge(model), names=["attn.c_attn"])[0].direction == pytest.approx(
        found.direction
    )


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_of_a_peft_model(dora, accelerated):
    torch.manual_seed(0)
    config = LoraConfig(r=3, init_lora_weights=False, use_dora=dora, target_modules="all-linear")
    model = get_peft_model(llama(), config)
    if accelerated:
        fastpeft.patch(model)
    base = llama()
    found = changes_of(model, names="(.*)q_proj")
    assert [c.path for c in found] == [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    merged = copy.deepcopy(model).merge_and_unload()
    for c in found:
        path = c.path.removeprefix("base_model.model.")
        assert_is(c, base.get_submodule(path).weight, merged.get_submodule(path).weight, "column", 1e-3)


def test_between_folders(tmp_path, monkeypatch):
    before = llama(torch.bfloat16)
    after = moved(before)
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after", max_shard_size="20KB")
    assert len(list((tmp_path / "after").glob("*.safetensors"))) > 1
    sizes = []
    double = torch.Tensor.double

    def watched(tensor):
        sizes.append(tensor.numel())
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "double", watched)
    for per in ("column", "row"):
        found = changes_between_folders(tmp_path / "before", tmp_path / "after", per=per)
        assert sorted(found, key=lambda c: c.path) == sorted(
            changes_between(before, after, per=per), key=lambda c: c.path
        )
    assert max(sizes) <= max(directions._BLOCK, 48)
    (head,) = changes_between_folders(tmp_path / "before", tmp_path / "after", names=["lm_head"])
    assert head.layer is None
    single = changes_between_folders(tmp_path / "before" / "model.safetensors", tmp_path / "after")
    assert len(single) == 14


def test_folders_that_do_not_fit(tmp_path):
    for name, tensors in {
        "a": {"layers.0.w.weight": torch.ones(4, 3)},
        "b": {"layers.0.w.weight": torch.ones(3, 4)},
        "c": {"layers.0.w.weight": torch.ones(4, 3), "layers.1.w.weight": torch.ones(4, 3)},
        "d": {"layers.0.w.weight": torch.ones(4, 3, dtype=torch.int8)},
        "e": {"w.weight": torch.ones(4, 3)},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "model.safetensors").write_bytes(b"\0" * 30)
    (tmp_path / "g").mkdir()
    for other, error, said in (
        ("b", ConfigError, r"layers\.0\.w: expected one shape, got \[4, 3\] before and \[3, 4\] after"),
        ("c", ConfigError, r"'layers\.1\.w' is only in the one after"),
        ("d", ConfigError, r"layers\.0\.w\.weight: expected a floating dtype, got I8"),
        ("e", ConfigError, r"'layers\.0\.w' is only in the one before"),
        ("f", CheckpointError, "is damaged or cut short"),
        ("g", CheckpointError, r"holds no \*\.safetensors"),
        ("h", CheckpointError, "does not exist"),
    ):
        with pytest.raises(error, match=said):
            changes_between_folders(tmp_path / "a", tmp_path / other)
    with pytest.raises(ConfigError, match="no weight to compare"):
        changes_between_folders(tmp_path / "e", tmp_path / "e")


def test_wrong_use():
    model = llama()
    with pytest.raises(ConfigError, match="per: expected one of column, row, got 'out'"):
        changes_between(model, model, per="out")
    with pytest.raises(ConfigError, match="has no adapter in a linear"):
        changes_of(model)
    with pytest.raises(ConfigError, match=r"no weight to compare that is named \['nothing'\]"):
        changes_between(model, model, names=["nothing"])
    patched = fastpeft.merge(fastpeft.patch(model), keep_base=False)
    with pytest.raises(ConfigError, match="the weight before is gone"):
        changes_of(patched)


def test_correlation():
    def change(m, d):
        return Change("w", 0, "w", m, d)

    line = [change(m, 3.0 - 2 * m) for m in (0.1, 0.7, 0.2)]
    assert correlation(line) == pytest.approx(-1.0)
    assert correlation([change(1, 1), change(2, 2), change(1, 2), change(2, 1)]) == pytest.approx(0.0)
    for bad in ([], [change(1, 2)], [change(1, 2), change(1, 3)]):
        with pytest.raises(ConfigError, match=f"expected changes of different sizes, got {len(bad)}"):
            correlation(bad)
