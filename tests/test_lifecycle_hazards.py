"""What is done to a patched model in between: blocks inside blocks, casts by swapping, removal, folders."""

from __future__ import annotations

import gc
import pickle
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import fastpeft
from fastpeft.errors import CheckpointError, PatchError
from fastpeft.layers.adapter import AdapterMixin
from fastpeft.layers.norm_cache import NormCache
from fastpeft.methods.linears import adapter_layers
from fastpeft.ops import cpu_gemm
from fastpeft.sparse.states import Aside
from fastpeft_kernels import launch
from tests.models import llama, tokens


def warmed(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with an update that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def patched(base: nn.Module | None = None, **options: object) -> nn.Module:
    model = llama() if base is None else base
    return warmed(fastpeft.patch(model, fastpeft.LoRA(**{"r": 4, **options})))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


# --- blocks inside blocks


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_a_mixed_batch_inside_another_gives_its_rows_back(fails):
    model = patched().eval()
    warmed(fastpeft.add_adapter(model, "two", fastpeft.LoRA(r=4)), seed=9)
    rows = len(tokens())
    alone = logits(model)
    with fastpeft.mixed_batch(model, ["two"] * rows):
        before = logits(model)
        try:
            with fastpeft.mixed_batch(model, ["default"] * rows):
                torch.testing.assert_close(logits(model), alone)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert torch.equal(logits(model), before)
    assert not torch.allclose(before, alone)
    assert torch.equal(logits(model), alone)


def test_adapters_disabled_inside_a_block_that_disables_them_stay_so():
    model = patched().eval()
    with fastpeft.disable_adapters(model):
        before = logits(model)
        with fastpeft.disable_adapters(model):
            assert torch.equal(logits(model), before)
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before)


# --- layers taken away


def accelerated(**options: object) -> nn.Module:
    model = get_peft_model(llama(), LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))
    return fastpeft.patch(warmed(model).eval())


def traces(model: nn.Module) -> list[str]:
    """Whatever of ours a model's modules hold."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "fastpeft" in f"{name} {type(value).__module__} {getattr(value, 'func', None)}"
    ]


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("inner", [False, True], ids=["peft-model", "its-base"])
def test_a_model_that_peft_has_unloaded_pickles_without_us(verb, inner):
    model = accelerated()
    base = model.base_model.model
    if inner:
        fastpeft.patch(fastpeft.unpatch(model).base_model.model)
    assert traces(base)
    expected = logits(model if verb == "merge_and_unload" else llama())
    result = getattr(model, verb)()
    assert result is base
    assert not traces(result)
    assert b"fastpeft" not in pickle.dumps(result)
    torch.testing.assert_close(logits(result), expected, rtol=1e-3, atol=1e-4)


def test_a_model_unloaded_is_patched_like_any_other():
    base = accelerated().unload()
    expected = logits(base)
    fastpeft.patch(base, fastpeft.LoRA(r=2))
    fastpeft.unpatch(base)
    assert torch.equal(logits(base), expected)
    assert not traces(base)


def test_ours_wrapped_by_other_code_still_computes_after_unloading():
    """As accelerate's hooks wrap a forward that they call on."""
    model = accelerated()
    mlp = model.base_model.model.model.layers[0].mlp
    old = mlp.forward
    assert "fastpeft" in old.func.__module__
    base = model.unload()
    x = torch.randn(3, mlp.down_proj.out_features)
    assert torch.equal(old(x), type(mlp).forward(mlp, x))
    assert torch.equal(logits(base), logits(llama()))


def test_a_model_whose_peft_layers_were_taken_away_is_patched_and_unpatched_as_a_plain_one():
    model = fastpeft.patch(inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), llama()))
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(path, module.base_layer)
    expected = logits(model)
    fastpeft.patch(model, fastpeft.LoRA(r=2))
    assert len(fastpeft.report(model).patched) == 14
    fastpeft.unpatch(model)
    assert not any(isinstance(module, AdapterMixin) for module in model.modules())
    assert not traces(model)
    assert torch.equal(logits(model), expected)


class Scaled(nn.Linear):
    """A linear with a buffer of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("factor", torch.full((8,), 2.0), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


def test_unpatch_gives_buffers_back_where_and_as_they_are_now():
    model = nn.Sequential(Scaled(), Scaled())
    fastpeft.patch(model, fastpeft.LoRA(r=2, target_modules="all-linear"))
    model.double()
    expected = model(torch.ones(3, 8, dtype=torch.float64))
    fastpeft.unpatch(model)
    assert [t.dtype for layer in model for t in (layer.weight, layer.factor)] == [torch.float64] * 4
    torch.testing.assert_close(model(torch.ones(3, 8, dtype=torch.float64)), expected)
    assert torch.equal(model[0].factor, torch.full((8,), 2.0, dtype=torch.float64))


def test_unpatch_gives_back_the_scale_of_gemmas_embedding():
    config = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, **config))
    fastpeft.patch(model, fastpeft.LoRA(r=2, target_modules=("embed_tokens",)))
    model.to("meta")
    embedding = fastpeft.unpatch(model).get_input_embeddings()
    assert embedding.weight.device.type == embedding.embed_scale.device.type == "meta"


# --- parameters that are swapped


@pytest.fixture
def swapping():
    """Casts, moves and loads by torch.utils.swap_tensors, as one may ask torch for."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


both_kinds = pytest.mark.parametrize("kind", [patched, accelerated], ids=["plain", "in-place"])


@both_kinds
def test_dora_that_has_computed_can_be_cast_by_swapping(kind, swapping):
    model = kind(use_dora=True).eval()
    logits(model)
    model.double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    torch.testing.assert_close(logits(model), logits(kind(use_dora=True).eval().double()))


@both_kinds
def test_dora_that_has_computed_can_load_by_swapping(kind, swapping):
    model = kind(use_dora=True).eval()
    before = {key: value * 1.25 for key, value in model.state_dict().items()}
    logits(model)
    model.load_state_dict(before)
    fresh = kind(use_dora=True).eval()
    fresh.load_state_dict(before)
    assert torch.equal(logits(model), logits(fresh))


# --- folders for merged adapters


@pytest.mark.parametrize("verb", [fastpeft.load, fastpeft.hotswap], ids=["load", "hotswap"])
def test_a_merged_adapter_takes_no_values(verb, tmp_path):
    model = patched().eval()
    fastpeft.save(model, tmp_path)
    fastpeft.merge(warmed(model, seed=4))
    before, values = logits(model), [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(PatchError, match="'default' is merged"):
        verb(model, tmp_path)
    assert torch.equal(logits(model), before)
    assert all(map(torch.equal, model.parameters(), values))
    verb(fastpeft.unmerge(model), tmp_path)
    torch.testing.assert_close(logits(model), logits(patched().eval()))


def test_an_adapter_beside_a_merged_one_takes_values(tmp_path):
    model = patched().eval()
    fastpeft.save(model, tmp_path)
    fastpeft.add_adapter(model, "two", fastpeft.LoRA(r=4, lora_alpha=16))
    fastpeft.merge(model, "default")
    fastpeft.hotswap(model, tmp_path, "two")
    with pytest.raises(CheckpointError, match="default is merged"):
        fastpeft.load(model, tmp_path, "three")
    fastpeft.set_adapter(fastpeft.unmerge(model), "two")
    torch.testing.assert_close(logits(model), logits(patched().eval()))


def test_a_merged_subspace_takes_no_values(tmp_path):
    model = fastpeft.patch(llama(), fastpeft.IntrinsicDimension(d=50))
    fastpeft.save(model, tmp_path)
    fastpeft.merge(model)
    with pytest.raises(PatchError, match="'default' is merged"):
        fastpeft.load(model, tmp_path)
    fastpeft.load(fastpeft.unmerge(model), tmp_path)


# --- adapters that are deleted


def caches() -> int:
    gc.collect()
    return sum(isinstance(thing, NormCache) for thing in gc.get_objects())


def test_nothing_is_kept_of_adapters_that_peft_has_deleted():
    model = accelerated(use_dora=True)
    logits(model)
    before = caches()
    assert before
    for name in ("one", "two"):
        model.add_adapter(name, LoraConfig(r=4, target_modules="all-linear", use_dora=True))
        model.set_adapter(name)
        logits(model)
        assert caches() == 2 * before
        model.set_adapter("default")
        model.delete_adapter(name)
        assert caches() == before
    fastpeft.unpatch(model)
    assert caches() == 0
    assert not traces(model)


# --- parametrized adapters


class Half(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor * 0.5


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_a_parametrized_matrix_is_computed_and_trains(kind, use_dora):
    model, other = (patched(use_dora=use_dora).eval() for _ in range(2))
    for path, layer in adapter_layers(model):
        register_parametrization(getattr(layer, kind), "default", Half())
        with torch.no_grad():
            getattr(other.get_submodule(path), kind)["default"].mul_(0.5)
    for some in (model, other):
        some(tokens(), labels=tokens()).loss.backward()
    torch.testing.assert_close(logits(model), logits(other))
    for path, layer in adapter_layers(model):
        trained = getattr(layer, kind).parametrizations.default.original.grad
        torch.testing.assert_close(trained, 0.5 * getattr(other.get_submodule(path), kind)["default"].grad)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(other))


def test_a_parametrized_matrix_is_switched_on_and_off():
    model = patched()
    fastpeft.add_adapter(model, "two", fastpeft.LoRA(r=2))
    layers = [layer for _, layer in adapter_layers(model)]
    for layer in layers:
        register_parametrization(layer.lora_A, "default", Half())
    for name in ("two", "default"):
        fastpeft.set_adapter(model, name)
        for layer in layers:
            assert layer.lora_A.parametrizations.default.original.requires_grad == (name == "default")
            assert layer.lora_A["two"].requires_grad == (name == "two")


@pytest.mark.parametrize("weight_normed", [False, True])
def test_a_parametrized_adapter_is_deleted(weight_normed):
    model = patched()
    before = logits(model)
    keys = list(model.state_dict())
    fastpeft.add_adapter(model, "two", fastpeft.LoRA(r=2))
    for _, layer in adapter_layers(model):
        if weight_normed:  # made of two tensors
            weight_norm(layer.lora_A, "two")
        else:
            register_parametrization(layer.lora_A, "two", Half())
    fastpeft.set_adapter(model, "two")
    fastpeft.delete_adapter(model, "two")
    assert list(model.state_dict()) == keys
    assert fastpeft.active_adapters(model) == ("default",)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


# --- devices


def test_counters_of_recorded_launches_are_their_own(monkeypatch):
    x = torch.zeros(1)
    kept = launch.counters(8, x)
    assert launch.counters(8, x) is kept
    monkeypatch.setattr(launch, "_is_recorded", lambda like: True)
    kept.fill_(1)
    recorded = launch.counters(8, x)
    assert not recorded.any()
    assert launch.counters(8, x).data_ptr() != recorded.data_ptr()
    assert all(buffer.data_ptr() != recorded.data_ptr() for buffer in launch._COUNTERS.values())
    kept.zero_()


def test_counters_in_a_pool_of_somebody_elses_are_not_kept(monkeypatch):
    monkeypatch.setattr(launch, "_COUNTERS", {})
    monkeypatch.setattr(launch, "_PRIVATE", set())
    questions = []
    monkeypatch.setattr(launch, "_is_in_private_pool", lambda tensor: not questions.append(tensor))
    for _ in range(2):
        first, second = (launch.counters(8, torch.zeros(1)) for _ in range(2))
        assert first.data_ptr() != second.data_ptr()
        assert not launch._COUNTERS
    assert len(questions) == 1
    monkeypatch.setattr(launch, "_PRIVATE", set())
    monkeypatch.setattr(launch, "_is_in_private_pool", lambda tensor: False)
    assert launch.counters(8, torch.zeros(1)) is launch.counters(8, torch.zeros(1))


@pytest.mark.parametrize(("pool", "is_private"), [((0, 0), False), ((0, 1), True), ((3, 0), True)])
def test_a_pool_is_told_by_the_snapshot(monkeypatch, pool, is_private):
    class OnGpu:
        device = torch.device("cuda")

        def untyped_storage(self):
            return self

        def data_ptr(self):
            return 1000

    segments = [
        {"address": 0, "total_size": 1000, "segment_pool_id": (9, 9)},
        {"address": 900, "total_size": 200, "segment_pool_id": pool},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert launch._is_in_private_pool(OnGpu()) is is_private
    monkeypatch.setattr(torch.cuda, "memory_snapshot", mock.Mock(side_effect=RuntimeError("no snapshot")))
    assert launch._is_in_private_pool(OnGpu()), "as with cudaMallocAsync: nobody knows"


@pytest.mark.parametrize("read", ["get", "lend", "tensors"])
def test_a_reader_of_offloaded_states_waits_for_their_copies(read, monkeypatch):
    class Event:
        waited = False

        def synchronize(self) -> None:
            self.waited = True

    parameter = nn.Parameter(torch.zeros(2))
    aside = Aside(torch.optim.AdamW([parameter]), "offload")
    aside.put(parameter)
    copy = Event()
    aside._copying.append(copy)
    getattr(aside, read)(*([parameter] if read == "get" else []))
    assert copy.waited
    assert not aside._copying


def test_the_cpus_products_are_timed_on_the_cpu(monkeypatch):
    real, seen = torch.Tensor.__matmul__, []

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        seen.extend([a.device.type, b.device.type, a.dtype])
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            cpu_gemm._least_seconds(torch.bfloat16, tokens=2, backward=False, repeats=1)
    finally:
        torch.set_default_dtype(default)
    assert set(seen) == {"cpu", torch.bfloat16, torch.float32}


# --- torch's own fast path


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "in-place"])
def test_the_report_tells_of_the_fast_path_that_leaves_adapters_out(in_place):
    names = ["linear1", "linear2"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        plain = encoder(x)
    if in_place:
        model = fastpeft.patch(get_peft_model(encoder, LoraConfig(r=4, target_modules=names)))
    else:
        model = fastpeft.patch(encoder, fastpeft.LoRA(r=4, target_modules=tuple(names)))
    warmed(model).eval()
    lines = [line for line in str(fastpeft.report(model)).splitlines() if "fast path" in line]
    assert len(lines) == 2
    assert all("linear1, linear2" in line and "set_fastpath_enabled(False)" in line for line in lines)
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain)  # what the line is about
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert not torch.allclose(model(x), plain, atol=1e-2)
        finally:
            torch.backends.mha.set_fastpath_enabled(was_enabled)
