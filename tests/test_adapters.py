"""Several adapters in one model without PEFT: switching, disabling, merging, combining, mixing, swapping."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastpeft
from fastpeft.layers import norm_cache
from fastpeft.layers.adapter import AdapterMixin
from fastpeft.layers.rows import row_norms
from fastpeft.methods.linears import adapter_layers
from fastpeft.ops.row_norm import row_norm, row_norm_squared
from tests.architectures import ARCHITECTURES
from tests.models import gpt2, llama, tokens
from tests.tolerance import relative_error

FIRST = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
SECOND = {
    "r": 2,
    "lora_alpha": 3,
    "init_lora_weights": False,
    "target_modules": ["q_proj", "down_proj", "lm_head"],
}


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def two(use_dora: bool = False, base=llama, **second) -> nn.Module:
    """A model with "default" active and "second" beside it, whose magnitudes are not at their norm."""
    torch.manual_seed(3)
    model = fastpeft.patch(base(), fastpeft.LoRA(**FIRST, use_dora=use_dora))
    options = {**SECOND, **second} if base is llama else FIRST
    fastpeft.add_adapter(model, "second", fastpeft.LoRA(**options, use_dora=use_dora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def in_peft(model: nn.Module, folder, names, base=llama) -> PeftModel:
    """The same adapters in a PEFT model, through files, in eval mode and active together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            fastpeft.save(model, folder / name, name)
        theirs = PeftModel.from_pretrained(base(), folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            theirs.load_adapter(folder / name, name)
    theirs.base_model.set_adapter(list(names))
    return theirs.eval()


both_methods = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@both_methods
@pytest.mark.parametrize("base", [llama, gpt2])
def test_every_choice_of_active_adapters_is_pefts(use_dora, base, tmp_path):
    model = two(use_dora, base)
    theirs = in_peft(model, tmp_path, ("default", "second"), base)
    seen = []
    for names in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        fastpeft.set_adapter(model, names)
        theirs.base_model.set_adapter(names)
        assert fastpeft.active_adapters(model) == tuple(names)
        torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
        seen.append(logits(model))
        trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == set(names)
    assert not torch.allclose(seen[0], seen[1])


@both_methods
def test_disabled_is_the_base(use_dora):
    model = two(use_dora)
    before = logits(model)
    with fastpeft.disable_adapters(model):
        assert torch.equal(logits(model), logits(llama()))
        with fastpeft.disable_adapters(model):
            pass
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), before)


@both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [None, "second", ["default", "second"]], ids=str)
def test_merge_computes_the_same_and_unmerge_gives_every_bit_back(use_dora, dtype, names):
    model = two(use_dora).to(dtype)
    fastpeft.set_adapter(model, names or "default")
    base = {name: p.clone() for name, p in model.named_parameters()}
    before = logits(model)
    fastpeft.merge(model, names)
    assert all(layer.base_forward is not None for _, layer in adapter_layers(model))
    merged = logits(model)
    loose = 1e-4 if dtype is torch.float32 else 0.05
    assert (merged - before).norm() <= loose * before.norm()
    assert any(not torch.equal(p, base[name]) for name, p in model.named_parameters())
    fastpeft.unmerge(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), before)


@both_methods
def test_merged_weight_is_the_formula_rounded_once(use_dora):
    model = two(use_dora)
    layer = model.model.layers[0].self_attn.q_proj
    W, A, B = (
        t.detach().double() for t in (layer.weight.clone(), layer.lora_A["default"], layer.lora_B["default"])
    )
    expected = W + 2.0 * B @ A
    if use_dora:
        m = layer.lora_magnitude_vector["default"].detach().double()
        expected *= (m / expected.norm(dim=1))[:, None]
    fastpeft.merge(model)
    assert (layer.weight - expected).norm() <= 2 * (
        expected.float() - expected
    ).norm() + 1e-7 * expected.norm()


def weighted(model: nn.Module, path: str, factors: dict[str, float], dtype: torch.dtype) -> torch.Tensor:
    """W + sum of f (W' - W), by the formulas."""
    layer = model.get_submodule(path)
    W = layer.weight.detach().to(dtype)
    merged = W.clone()
    for name, factor in factors.items():
        if name not in layer.specs:
            continue
        A, B = (getattr(layer, kind)[name].detach().to(dtype) for kind in ("lora_A", "lora_B"))
        alone = W + layer.specs[name].scaling * B @ A
        if layer.specs[name].use_dora:
            m = layer.lora_magnitude_vector[name].detach().to(dtype)
            alone = alone * (m / alone.norm(dim=1))[:, None]
        merged = merged + factor * (alone - W)
    return merged


@both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_with_factors_is_the_weighted_sum_of_what_each_makes_of_the_base(use_dora, dtype):
    model = two(use_dora).to(dtype)
    base = {name: p.clone() for name, p in model.named_parameters()}
    before = logits(model)
    factors = {"default": 0.7, "second": -0.4}
    paths = tuple(f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"))
    paths += ("lm_head",)
    exact = {path: weighted(model, path, factors, torch.float64) for path in paths}
    plain = {path: weighted(model, path, factors, dtype) for path in paths}
    fastpeft.merge(model, factors)
    merged = {path: model.get_submodule(path).weight.detach().clone() for path in paths}
    for path in paths:
        assert (merged[path] - exact[path]).norm() <= 2 * (plain[path] - exact[path]).norm()
        assert not torch.equal(merged[path], base[f"{path}.weight"])
    fastpeft.unmerge(model)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), before)
    fastpeft.merge(model, dict(reversed(factors.items())))  # the order is of no account
    for path in paths:
        found = model.get_submodule(path).weight
        assert (found - exact[path]).norm() <= 2 * (plain[path] - exact[path]).norm()


@both_methods
def test_factors_of_one_and_none(use_dora):
    model = two(use_dora)
    base = {name: p.clone() for name, p in model.named_parameters()}
    fastpeft.merge(model, {"default": 0.0, "second": 0})
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    fastpeft.unmerge(model)
    by_factor = logits(fastpeft.merge(copy.deepcopy(model), {"second": 1.0}))
    torch.testing.assert_close(by_factor, logits(fastpeft.merge(model, "second")), rtol=1e-4, atol=1e-5)


def test_a_merge_with_factors_of_lora_is_pefts_weighted_adapter(tmp_path):
    model = two(target_modules=None)
    theirs = in_peft(model, tmp_path, ("default", "second"))
    theirs.add_weighted_adapter(["default", "second"], [0.7, 0.3], "mix", combination_type="cat")
    theirs.set_adapter("mix")
    fastpeft.merge(model, {"default": 0.7, "second": 0.3})
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), True, "1", None])
def test_factors_that_are_no_numbers(factor):
    model = two()
    with pytest.raises(fastpeft.ConfigError, match="merge: expected a finite number for 'second', got"):
        fastpeft.merge(model, {"default": 0.5, "second": factor})
    with pytest.raises(fastpeft.PatchError, match="merge: the model has no adapter 'third'"):
        fastpeft.merge(model, {"third": 0.5})
    with pytest.raises(fastpeft.PatchError, match="merge: the model has no adapter"):
        fastpeft.merge(model, {})
    with pytest.raises(fastpeft.PatchError, match="nothing is merged"):
        fastpeft.unmerge(model)


def test_a_failed_merge_changes_nothing():
    model = two()
    base = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B["default"][0, 0] = float("inf")
    with pytest.raises(fastpeft.PatchError, match=r"layers.1.mlp.up_proj is not finite; nothing was merged"):
        fastpeft.merge(model)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, base[n])]
    assert changed == ["model.layers.1.mlp.up_proj.lora_B.default"]
    with pytest.raises(fastpeft.PatchError, match="nothing is merged"):
        fastpeft.unmerge(model)


def test_a_tied_weight_is_not_merged():
    model = fastpeft.patch(llama(tied=True), fastpeft.LoRA(r=2, target_modules=["lm_head"]))
    with pytest.raises(
        fastpeft.PatchError, match=r"lm_head is tied to model.embed_tokens, which would change"
    ):
        fastpeft.merge(model)


def test_what_a_merged_model_refuses_and_what_it_does():
    model = fastpeft.merge(two())
    for act in (
        lambda: fastpeft.merge(model),
        lambda: fastpeft.set_adapter(model, "second"),
        lambda: fastpeft.add_adapter(model, "third"),
        lambda: fastpeft.delete_adapter(model, "second"),
        lambda: fastpeft.disable_adapters(model).__enter__(),
        lambda: fastpeft.mixed_batch(model, ["second"]).__enter__(),
    ):
        with pytest.raises(fastpeft.PatchError, match=r"default is merged; call fastpeft\.unmerge"):
            act()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(fastpeft.unmerge(twin)), logits(two()))
    fastpeft.unpatch(model)
    assert torch.equal(logits(model), logits(llama()))
    gone = fastpeft.merge(two(), keep_base=False)
    for act in (fastpeft.unmerge, fastpeft.unpatch):
        with pytest.raises(fastpeft.PatchError, match="keep_base=False, its base weight is gone"):
            act(gone)


@both_methods
@pytest.mark.parametrize("base", [llama, gpt2])
def test_rows_of_a_mixed_batch_are_computed_as_if_alone(use_dora, base):
    model = two(use_dora, base)
    ids = tokens(5)
    names = ["second", "__base__", "default", "second", "default"]
    with fastpeft.mixed_batch(model, names):
        mixed = logits(model, ids)
    for row, name in enumerate(names):
        if name == "__base__":
            with fastpeft.disable_adapters(model):
                alone = logits(model, ids[row : row + 1])
        else:
            fastpeft.set_adapter(model, name)
            alone = logits(model, ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@both_methods
@pytest.mark.parametrize("base", ["llama", "gemma3"])
def test_rows_of_a_mixed_batch_have_their_own_embeddings(use_dora, base):
    """Gemma multiplies its embeddings' rows by a factor."""
    model = llama() if base == "llama" else ARCHITECTURES[base][0]()
    torch.manual_seed(0)
    options = {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": False, "use_dora": use_dora}
    fastpeft.patch(model, fastpeft.LoRA(r=2, lora_alpha=1, **options))
    fastpeft.add_adapter(model, "second", fastpeft.LoRA(r=3, lora_alpha=2, **options))
    ids = tokens(5)
    names = ["second", "__base__", "default", "second", "default"]
    with fastpeft.mixed_batch(model, names):
        mixed = logits(model, ids)
    for row, name in enumerate(names):
        fastpeft.set_adapter(model, "default" if name == "__base__" else name)
        with fastpeft.disable_adapters(model) if name == "__base__" else contextlib.nullcontext():
            alone = logits(model, ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def many(kind: str, adapters: int, use_dora: bool) -> nn.Module:
    """One layer with that many adapters."""
    model = nn.Sequential(nn.Linear(8, 8) if kind == "linear" else nn.Embedding(9, 8)).eval()
    options = {"target_modules": ["0"], "use_dora": use_dora, "init_lora_weights": False}
    fastpeft.patch(model, fastpeft.LoRA(r=2, **options), adapter_name="0")
    for i in range(1, adapters):
        fastpeft.add_adapter(model, str(i), fastpeft.LoRA(r=1 + i % 3, **options))
    return model


def products_in_a_mixed_batch(model: nn.Module, adapters: int, calls: int = 1) -> int:
    """Products of the last call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func.__name__.startswith(("mm", "addmm", "bmm", "mv", "addmv"))
            return func(*args, **(kwargs or {}))

    names = list(itertools.islice(itertools.cycle(map(str, range(adapters))), 12))
    x = torch.randn(12, 8) if isinstance(model[0], nn.Linear) else torch.arange(12)[:, None] % 9
    with torch.no_grad(), fastpeft.mixed_batch(model, names):
        for _ in range(calls - 1):
            model(x)
        with mock.patch.object(norm_cache, "is_intercepted", return_value=False), Count() as count:
            model(x)
    return count.products


@both_methods
@pytest.mark.parametrize(("kind", "products"), [("linear", 3), ("embedding", 1)])
def test_a_mixed_batch_makes_the_same_products_for_any_number_of_adapters(kind, products, use_dora):
    """The base's and two of the adapters'; DoRA's norms are there from the call before."""
    for adapters in (1, 6):
        assert products_in_a_mixed_batch(many(kind, adapters, use_dora), adapters, calls=2) == products


@pytest.mark.parametrize(("kind", "products"), [("linear", 3 + 4), ("embedding", 1 + 4)])
def test_norms_that_are_not_kept_take_four_products_for_any_number_of_adapters(kind, products, monkeypatch):
    """As on a GPU, where nothing tells in evaluation that A and B are what they were."""
    monkeypatch.setattr(AdapterMixin, "kept_norm", lambda layer, adapter: None)
    for adapters in (1, 6):
        assert products_in_a_mixed_batch(many(kind, adapters, True), adapters) == products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_many_adapters_are_each_one_s(dtype):
    layer = many("linear", 5, True)[0].to(dtype)
    adapters = layer.adapters(list(layer.specs))
    for adapter, found in zip(adapters, row_norms(layer.weight, adapters), strict=True):
        A, B, W = (t.detach().double() for t in (adapter.lora_A, adapter.lora_B, layer.weight))
        exact = (W + adapter.scaling * B @ A).norm(dim=1)
        alone = row_norm(
            layer.weight, adapter.lora_A, adapter.lora_B, adapter.scaling, row_norm_squared(layer.weight)
        )
        assert (found - exact).norm() <= 2 * (alone - exact).norm() + 1e-6 * exact.norm()


def test_mixed_batch_of_the_wrong_size():
    model = two()
    said = r"expected 3 rows, one for each name, got x \[2, 9, 32\]"
    with pytest.raises(fastpeft.ShapeError, match=said), fastpeft.mixed_batch(model, ["default"] * 3):
        logits(model)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_combination_is_the_weighted_sum_of_updates(method, tmp_path):
    torch.manual_seed(0)
    model = fastpeft.patch(llama(), fastpeft.LoRA(**FIRST))
    fastpeft.add_adapter(model, "second", fastpeft.LoRA(**{**FIRST, "lora_alpha": 3}))
    fastpeft.combine_adapters(model, {"default": 0.7, "second": -0.4}, "mix", method=method)
    layer = model.model.layers[1].mlp.up_proj

    def update(name):
        return layer.specs[name].scaling * layer.lora_B[name] @ layer.lora_A[name]

    wanted = 0.7 * update("default") - 0.4 * update("second")
    if method == "svd":
        U, S, V = torch.linalg.svd(wanted)
        wanted = (U[:, :4] * S[:4]) @ V[:4]
    torch.testing.assert_close(update("mix"), wanted, rtol=1e-4, atol=1e-5)
    fastpeft.set_adapter(model, "mix")
    fastpeft.save(model, tmp_path)
    torch.testing.assert_close(logits(fastpeft.load(llama(), tmp_path)), logits(model))
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


@both_methods
def test_hotswap_keeps_every_parameter_and_number(use_dora, tmp_path):
    torch.manual_seed(1)
    other = fastpeft.patch(llama(), fastpeft.LoRA(**{**FIRST, "r": 2, "lora_alpha": 5}, use_dora=use_dora))
    fastpeft.save(other, tmp_path)
    model = two(use_dora)
    parameters = dict(model.named_parameters())
    specs = [dict(layer.specs) for _, layer in adapter_layers(model)]
    fastpeft.hotswap(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert [dict(layer.specs) for _, layer in adapter_layers(model)] == specs


@both_methods
def test_a_compiled_model_takes_a_hotswap_and_accumulates_without_recompiling(use_dora, tmp_path):
    torch.manual_seed(1)
    other = fastpeft.patch(llama(), fastpeft.LoRA(**{**FIRST, "r": 3, "lora_alpha": 5}, use_dora=use_dora))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    fastpeft.save(other, tmp_path)
    model = fastpeft.patch(llama(), fastpeft.LoRA(**FIRST, use_dora=use_dora))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def accumulated(which: nn.Module) -> list[torch.Tensor]:
        """The gradients of two steps of one batch, the second added to the first."""
        model.zero_grad()
        for seed in (0, 1):
            ids = tokens().roll(seed, dims=1)
            which(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    before = accumulated(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        fastpeft.hotswap(model, tmp_path)
        after = accumulated(compiled)
    for got, want, was in zip(after, accumulated(model), before, strict=True):
        assert relative_error(got, want) <= 1e-4
        assert relative_error(got, was) > 1e-2


def test_hotswap_refuses_what_does_not_fit_and_changes_nothing(tmp_path):
    fastpeft.save(fastpeft.patch(llama(), fastpeft.LoRA(r=8)), tmp_path / "wide")
    fastpeft.save(fastpeft.patch(llama(), fastpeft.LoRA(r=2, use_dora=True)), tmp_path / "dora")
    fastpeft.save(fastpeft.patch(llama(), fastpeft.LoRA(r=2, target_modules=["q_proj"])), tmp_path / "few")
    model = two()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for folder, said in (
        ("wide", "the folder has r=8"),
        ("dora", "use_dora=True"),
        ("few", "missing in the file"),
    ):
        with pytest.raises(fastpeft.CheckpointError, match=said):
            fastpeft.hotswap(model, tmp_path / folder)
    with pytest.raises(fastpeft.PatchError, match="has no adapter 'third'"):
        fastpeft.hotswap(model, tmp_path / "few", "third")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_load_adds_an_adapter_beside_the_others(tmp_path):
    fastpeft.save(two(), tmp_path, "second")
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=1))
    before = logits(model)
    fastpeft.load(model, tmp_path, "second")
    assert torch.equal(logits(model), before)
    fastpeft.set_adapter(model, "second")
    expected = fastpeft.set_adapter(two(), "second")
    assert torch.equal(logits(model), logits(expected))
    fastpeft.save(fastpeft.patch(gpt2(), fastpeft.LoRA(r=1)), tmp_path / "gpt2")
    modules = [(path, type(m)) for path, m in model.named_modules()]
    with pytest.raises(fastpeft.CheckpointError, match="does not fit this model"):
        fastpeft.load(model, tmp_path / "gpt2", "third")
    assert [(path, type(m)) for path, m in model.named_modules()] == modules


def test_delete_takes_modules_back_that_only_it_had():
    model = two()
    fastpeft.delete_adapter(model, "second")
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(logits(model), logits(fastpeft.set_adapter(two(), "default")))
    with pytest.raises(fastpeft.PatchError, match="only adapter"):
        fastpeft.delete_adapter(model, "default")
    model = two()
    fastpeft.delete_adapter(model, "default")
    assert fastpeft.active_adapters(model) == ("second",)
    assert torch.equal(logits(model), logits(fastpeft.set_adapter(two(), "second")))
    fastpeft.unpatch(model)
    assert torch.equal(logits(model), logits(llama()))


def test_wrong_names():
    model = two()
    for act, said in (
        (lambda: fastpeft.set_adapter(model, "third"), "set_adapter: the model has no adapter 'third'"),
        (lambda: fastpeft.set_adapter(model, []), "set_adapter: the model has no adapter"),
        (lambda: fastpeft.add_adapter(model, "second"), "already has an adapter 'second'"),
        (lambda: fastpeft.add_adapter(model, "a.b"), "without dots"),
        (lambda: fastpeft.combine_adapters(model, {"default": 1, "second": 1}, "x"), "second targets other"),
        (lambda: fastpeft.save(fastpeft.set_adapter(model, ["default", "second"]), "x"), "name the adapter"),
        (lambda: fastpeft.merge(get_peft_model(llama(), LoraConfig())), "use PEFT's own methods"),
        (lambda: fastpeft.merge(llama()), "not patched by fastpeft"),
    ):
        with pytest.raises(fastpeft.PatchError, match=said):
            act()
    with pytest.raises(fastpeft.ConfigError, match="can only train with the first adapter"):
        fastpeft.add_adapter(model, "third", fastpeft.LoRA(bias="all"))
    with pytest.raises(fastpeft.PatchError, match="is DoRA"):
        fastpeft.combine_adapters(two(use_dora=True), {"default": 1.0}, "mix")


# --- embeddings


@both_methods
def test_embeddings_are_pefts(use_dora, tmp_path):
    config = LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False, use_dora=use_dora
    )
    theirs = get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastpeft.load(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    layer = ours.model.embed_tokens
    for ours_name, theirs_name in (("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")):
        expected = next(g for n, g in gradients.items() if theirs_name in n)
        torch.testing.assert_close(getattr(layer, ours_name)["default"].grad, expected, rtol=1e-3, atol=1e-6)
    fastpeft.save(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-4, atol=1e-5)
    before = logits(ours)
    fastpeft.merge(ours)
    torch.testing.assert_close(logits(ours), before, rtol=1e-4, atol=1e-5)
    fastpeft.unpatch(ours)
    assert torch.equal(logits(ours), logits(llama()))


def test_an_embedding_starts_at_the_base_and_learns():
    model = fastpeft.patch(llama(), fastpeft.LoRA(r=2, target_modules=["embed_tokens"]))
    assert torch.equal(logits(model), logits(llama()))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert model.model.embed_tokens.lora_A["default"].grad.any()
