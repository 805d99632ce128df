"""How adapters start: by the formula, as PEFT's, and out of the base and back into it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn

import fastpeft
from bench.saved import count, state_of
from fastpeft.layers import adapter
from fastpeft.layers.initialise import initialise
from fastpeft.methods.linears import adapter_layers
from tests.models import gpt2, llama, tokens
from tests.test_patch import assert_unchanged, snapshot
from tests.tolerance import assert_within_rule

REWRITING = ["pissa", "pissa_niter_8", "olora"]
SCALING = 1.5


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def factors(weight: torch.Tensor, how: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = torch.empty(r, weight.shape[1], dtype=weight.dtype), torch.zeros(weight.shape[0], r).to(weight)
    initialise(A, B, weight, how, SCALING)
    return A, B


def pefts(weight: torch.Tensor, how: str, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PEFT's A, B and rewritten weight, its random numbers drawn after seed 5."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    base.weight.data = weight.clone()
    config = peft.LoraConfig(r=r, lora_alpha=SCALING * r)
    layer = peft.tuners.lora.Linear(base, "default", config, r=r, lora_alpha=SCALING * r)
    torch.manual_seed(5)
    with torch.no_grad():
        if how == "orthogonal":
            layer.orthogonal_init("default")
        elif how == "olora":
            layer.olora_init("default")
        else:
            layer.pissa_init("default", how)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), base.weight.data


@pytest.mark.parametrize("shape", [(7, 11), (13, 5), (8, 8)], ids=str)
@pytest.mark.parametrize("how", [*REWRITING, "orthogonal"])
def test_numbers_are_pefts(how, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    their_A, their_B, _ = pefts(weight, how, 4)
    torch.manual_seed(5)
    A, B = factors(weight, how, 4)
    torch.testing.assert_close(A, their_A)
    torch.testing.assert_close(B, their_B)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_pissa_is_the_best_of_its_rank(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, Vh = torch.linalg.svd(weight.double())
    best = (U[:, :6] * S[:6]) @ Vh[:6]
    plain = torch.linalg.svd(weight)
    A, B = factors(weight, "pissa", 6)
    ours = SCALING * B @ A
    assert_within_rule(ours, best, (plain[0][:, :6] * plain[1][:6]) @ plain[2][:6], "principal part")
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))  # shared evenly between the two


def test_orthogonal_starts_at_nothing_without_zeros():
    torch.manual_seed(0)
    A, B = factors(torch.randn(30, 20), "orthogonal", 6)
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 3
    assert (B @ A).norm() < 1e-6 * A.norm() * B.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("how", REWRITING)
def test_what_leaves_the_base_is_in_the_adapter(how, make, dtype):
    base = make(dtype)
    config = fastpeft.LoRA(r=4, lora_alpha=6, init_lora_weights=how)
    model = fastpeft.patch(make(dtype), config)
    for path, layer in adapter_layers(model):
        weight = base.get_submodule(path).weight.detach()
        weight = weight.t() if make is gpt2 else weight
        A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
        assert not torch.equal(layer.weight_out_in(), weight)
        whole = layer.weight_out_in().double() + SCALING * B.double() @ A.double()
        plain = (weight.float() - SCALING * B @ A).to(dtype).double() + SCALING * B.double() @ A.double()
        assert_within_rule(whole, weight.double(), plain, path)
    assert_within_rule(logits(model), logits(make(dtype).double()), logits(base), how)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_model_starts_as_pefts(how, use_dora):
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": how, "use_dora": use_dora}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear", **options))
    ours = fastpeft.patch(llama(), fastpeft.LoRA(target_modules="all-linear", **options))
    for path, layer in adapter_layers(ours):
        other = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(layer.weight, other.base_layer.weight)
        torch.testing.assert_close(layer.lora_A["default"], other.lora_A["default"].weight)
        torch.testing.assert_close(layer.lora_B["default"], other.lora_B["default"].weight)
        if use_dora:
            m = other.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(layer.lora_magnitude_vector["default"], m)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def move(model, seed=3):
    """Every trained value elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


FILES = {
    "plain": {},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "c_fc": 2}, "alpha_pattern": {"v_proj": 3, "c_proj": 3}},
    "rslora-ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "biases": {"bias": "all", "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": r".*(embed_tokens|wte|q_proj|c_fc)"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", FILES.values(), ids=FILES)
def test_the_file_is_a_plain_lora_for_the_base_as_it_was(options, make, tmp_path):
    config = fastpeft.LoRA(r=4, lora_alpha=6, init_lora_weights="pissa", **options)
    model = move(fastpeft.patch(make(), config))
    fastpeft.save(model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (content["init_lora_weights"], content["r"]) == (True, 8)
    again = fastpeft.load(make(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(make())).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_pefts_file_for_a_rewritten_base(how, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=how, target_modules=["q_proj", "up_proj"])
    theirs = move(peft.get_peft_model(llama(), config))
    theirs.save_pretrained(tmp_path / "theirs")
    model = fastpeft.load(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    fastpeft.save(model, tmp_path / "plain")
    plain = fastpeft.load(llama(), tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(theirs), rtol=1e-5, atol=1e-5)
    content = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    content["init_lora_weights"] = "pissa_niter_4"
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(fastpeft.CheckpointError, match="rewritten at random"):
        fastpeft.load(llama(), tmp_path / "theirs")


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("how", REWRITING)
def test_unpatch_gives_the_base_back_to_the_bit(how, make, merged):
    model = make(torch.bfloat16)
    before = snapshot(model)
    fastpeft.patch(model, fastpeft.LoRA(r=4, init_lora_weights=how, use_dora=how == "pissa"))
    move(model)
    if merged:
        apart = logits(model)
        fastpeft.merge(model)
        torch.testing.assert_close(logits(model), apart, rtol=0.1, atol=0.1)
    fastpeft.unpatch(model)
    assert_unchanged(model, before)


def tied():
    return llama(tied=True)


def not_finite():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (tied, {"target_modules": ["q_proj", "lm_head"]}, "lm_head: .*tied to model.embed_tokens"),
        (llama, {"r": 17}, "k_proj: expected a rank of at most 16"),
        (lambda: llama().to("meta"), {"r": 2}, "q_proj: its weight is on the meta device"),
        (not_finite, {"exclude_modules": ["self_attn"]}, r"layers.1.mlp.down_proj: .*not finite"),
    ],
    ids=["tied", "rank", "meta", "nan"],
)
def test_refusals_leave_the_model_alone(make, options, said):
    model = make()
    values, flags, classes = snapshot(model)
    with pytest.raises(fastpeft.PatchError, match=said):
        fastpeft.patch(model, fastpeft.LoRA(**{"r": 2, "init_lora_weights": "pissa", **options}))
    after = snapshot(model)
    assert all(
        values[n].is_meta or torch.equal(values[n].nan_to_num(), after[0][n].nan_to_num()) for n in values
    )
    assert after[1:] == (flags, classes)


def test_memory_that_runs_out_half_way_leaves_the_model_alone(monkeypatch):
    model, calls = llama(), []
    before = snapshot(model)
    rewritten = adapter.merged_weight

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise MemoryError
        return rewritten(*arguments)

    monkeypatch.setattr(adapter, "merged_weight", fail)
    with pytest.raises(MemoryError):
        fastpeft.patch(model, fastpeft.LoRA(r=2, init_lora_weights="pissa"))
    assert_unchanged(model, before)


def test_what_needs_the_base_as_it_was_is_refused(tmp_path):
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2, init_lora_weights="pissa"))
    with (
        pytest.raises(fastpeft.PatchError, match="the base alone is not there"),
        fastpeft.disable_adapters(model),
    ):
        pass
    with pytest.raises(fastpeft.PatchError, match="the base alone is not there"):
        fastpeft.add_adapter(model, "other")
    plain = fastpeft.patch(llama(), fastpeft.LoRA(r=4))
    with pytest.raises(fastpeft.ConfigError, match="rewrites the base"):
        fastpeft.add_adapter(plain, "other", fastpeft.LoRA(r=2, init_lora_weights="olora"))
    fastpeft.save(plain, tmp_path)
    with pytest.raises(fastpeft.CheckpointError, match="rewritten base"):
        fastpeft.hotswap(model, tmp_path)
    with pytest.raises(fastpeft.CheckpointError, match="the base as it was"):
        fastpeft.load(model, tmp_path)


# --- LoRA-FA and rsLoRA


def saved_bytes(config, use_dora=False):
    """Bytes that one linear with an adapter keeps for backward, with x made by an op that keeps nothing."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    fastpeft.patch(model, fastpeft.LoRA(r=4, target_modules="all-linear", use_dora=use_dora, **config))
    leaf = torch.randn(256, 64, requires_grad=True)
    return count(lambda: model(leaf + 1).sum(), [leaf, *state_of(model)])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_lora_fa_keeps_no_input(use_dora, dropout):
    trains = saved_bytes({"lora_dropout": dropout}, use_dora)
    frozen = saved_bytes({"lora_dropout": dropout, "freeze_lora_A": True}, use_dora)
    x = 256 * 64 * 4
    assert [a - b for a, b in zip(trains, frozen, strict=True)] == [x, x]
    if not use_dora:
        assert frozen[0] <= 256 * 4 * 4 + 8  # S, and dropout's seed


def test_lora_fa_of_a_whole_block_and_through_peft():
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=4)).train()
    frozen = fastpeft.patch(llama(), fastpeft.LoRA(r=4, freeze_lora_A=True)).train()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    fastpeft.patch(theirs.train())
    create_lorafa_optimizer(theirs, r=4, lora_alpha=16, lr=1e-3)
    used = {}
    for name, m in (("all", model), ("fa", frozen), ("peft", theirs)):
        used[name] = count(lambda m=m: m(input_ids=tokens(), labels=tokens()).loss, state_of(m))[0]
    assert used["fa"] == used["peft"]
    # q, k and v's input and gate and up's go; norms keep theirs, attention its output, which o_proj had.
    assert used["all"] - used["fa"] >= 2 * 2 * tokens().numel() * 32 * 4


def test_lora_fa_trains_b_alone():
    torch.manual_seed(0)
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=4, lora_alpha=8, freeze_lora_A=True)).train()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for path, layer in adapter_layers(model):
            other = theirs.base_model.model.get_submodule(path)
            layer.lora_B["default"].normal_()
            other.lora_A["default"].weight.copy_(layer.lora_A["default"])
            other.lora_B["default"].weight.copy_(layer.lora_B["default"])
    for m in (model, theirs.train()):
        m(input_ids=tokens(), labels=tokens()).loss.backward()
    for path, layer in adapter_layers(model):
        other = theirs.base_model.model.get_submodule(path)
        assert layer.lora_A["default"].grad is None
        torch.testing.assert_close(
            layer.lora_B["default"].grad, other.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6
        )
    fastpeft.add_adapter(model, "other", fastpeft.LoRA(r=2))
    fastpeft.set_adapter(model, ["default", "other"])
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition(".lora_")[2] for name in training} == {"B.default", "A.other", "B.other"}
    assert "A frozen" in str(fastpeft.report(model))


@pytest.mark.filterwarnings("ignore")
def test_rslora_is_pefts():
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 9}}
    options["alpha_pattern"] = {"up_proj": 5}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear", **options))
    model = fastpeft.patch(llama(), fastpeft.LoRA(**options))
    found = {path: layer.specs["default"].scaling for path, layer in adapter_layers(model)}
    assert found["model.layers.0.self_attn.q_proj"] == 2.0  # 6 / sqrt(9)
    for path, scaling in found.items():
        assert scaling == theirs.base_model.model.get_submodule(path).scaling["default"], path
    torch.manual_seed(0)
    for path, layer in adapter_layers(model):
        other = theirs.base_model.model.get_submodule(path)
        with torch.no_grad():
            layer.lora_B["default"].normal_()
            other.lora_A["default"].weight.copy_(layer.lora_A["default"])
            other.lora_B["default"].weight.copy_(layer.lora_B["default"])
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
