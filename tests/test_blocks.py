"""Blocks: found in any class by what its forward does, computed as one op, and left alone where in doubt."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import backend
from fastpeft.blocks import gated, shared, worth
from fastpeft.blocks.install import described
from fastpeft.blocks.source import called_together
from tests.architectures import ARCHITECTURES
from tests.block_models import HIDDEN, WIDE, Attention, FusedAttention, FusedMlp, Mlp, blocks
from tests.in_place.cases import assert_same_as_peft, peft_model, with_adapters
from tests.models import llama, tokens
from tests.tolerance import relative_error


def patched(model: nn.Module, **options) -> nn.Module:
    torch.manual_seed(1)
    config = fastpeft.LoRA(r=2, target_modules=".*", init_lora_weights=False, **options)
    return fastpeft.patch(copy.deepcopy(model), config)


def gradients(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    x = [t.clone().requires_grad_() for t in inputs]
    y = model(*x)
    leaves = x + [p for p in model.parameters() if p.requires_grad]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [y, *(torch.zeros(()) if g is None else g for g in found)]


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """By norm: rounding errors of the largest elements are larger than some small elements."""
    assert relative_error(got, want.detach()) <= 1e-5 or got.norm() + want.norm() == 0.0


def one_ops(model: nn.Module) -> list[str]:
    return [line for line in fastpeft.report(model).blocks if "one op" in line]


def unfused(model: nn.Module) -> nn.Module:
    """A copy without blocks."""
    twin = copy.deepcopy(model)
    from fastpeft.blocks.install import release_blocks

    release_blocks(twin)
    return twin


def test_forwards_are_read_line_by_line():
    names = ("to_q", "to_k", "to_v", "out")
    assert called_together(Attention, names) == (("to_q", "to_k", "to_v"),)
    assert called_together(Attention, ("to_k", "to_v", "out")) == (("to_k", "to_v"),)
    assert called_together(Mlp, ("one", "two", "back")) == (("two", "one"),)
    assert called_together(type("Made", (nn.Module,), {"forward": len}), ("a",)) == ()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "layers",
    [
        (Attention(),),
        (Mlp(),),
        (Mlp(activation=F.gelu, swap=True),),
        (Attention(), Mlp()),
        (FusedMlp(),),
        (FusedMlp(F.gelu, gate_first=False, bias=True),),
    ],
    ids=["attention", "swiglu", "geglu-swapped", "both", "halves", "halves-swapped"],
)
def test_blocks_compute_what_their_linears_do(layers, use_dora):
    model = patched(blocks(*layers), use_dora=use_dora)
    assert len(one_ops(model)) == len(layers)
    x = torch.randn(3, 4, HIDDEN)
    with (
        mock.patch.object(shared, "stacked_linear", wraps=shared.stacked_linear) as stacked,
        mock.patch.object(gated, "gated_mlp", wraps=gated.gated_mlp) as one_op,
    ):
        found = gradients(model, x)
        assert stacked.call_count == sum(isinstance(layer, Attention) for layer in layers)
        assert one_op.call_count == sum(isinstance(layer, (Mlp, FusedMlp)) for layer in layers)
        expected = gradients(unfused(model), x)
        assert stacked.call_count + one_op.call_count == len(layers)
    for got, want in zip(found, expected, strict=True):
        assert_close(got, want)


def test_few_tokens_on_a_cpu_are_computed_linear_by_linear(monkeypatch):
    model = patched(blocks(Attention(), Mlp()))
    monkeypatch.setattr(worth, "MIN_ELEMENTS", 7 * HIDDEN)
    few, enough = torch.randn(2, 3, HIDDEN), torch.randn(7, HIDDEN)
    with (
        mock.patch.object(shared, "stacked_linear", wraps=shared.stacked_linear) as stacked,
        mock.patch.object(gated, "gated_mlp", wraps=gated.gated_mlp) as one_op,
    ):
        for got, want in zip(gradients(model, few), gradients(unfused(model), few), strict=True):
            assert_close(got, want)
        assert (stacked.call_count, one_op.call_count) == (0, 0)
        model(enough)
        assert (stacked.call_count, one_op.call_count) == (1, 1)
        if not torch.cuda.is_available():  # where kernels run, the choice is measured per op
            with fastpeft.use_backend("triton"):
                model(few)
            assert (stacked.call_count, one_op.call_count) == (2, 2)


@pytest.mark.parametrize("layer", [Attention, Mlp])
def test_compiled_blocks_do_not_depend_on_the_size(layer, monkeypatch):
    monkeypatch.setattr(worth, "MIN_ELEMENTS", 100 * HIDDEN)
    model = patched(blocks(layer()))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for tokens_ in (50, 150):
        x = torch.randn(tokens_, HIDDEN)
        torch._dynamo.mark_dynamic(x, 0, min=8, max=10_000)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(compiled(x), model(x))


def test_what_small_inputs_leave_behind(monkeypatch):
    monkeypatch.setattr(worth, "MIN_ELEMENTS", 7 * HIDDEN)
    model = patched(blocks(Attention()))
    attention = next(m for m in model.modules() if hasattr(m, "to_q"))
    few = torch.randn(3, HIDDEN)
    attention.to_q(torch.randn(9, HIDDEN))
    assert attention.to_k.siblings[0]._ready
    attention.to_k(few)
    assert not attention.to_k.siblings[0]._ready, "and with it x and its graph"


def test_few_tokens_need_no_backend_where_nothing_is_active(monkeypatch):
    monkeypatch.setattr(worth, "MIN_ELEMENTS", 10**6)
    model = patched(blocks(Mlp()))
    x = torch.randn(3, HIDDEN)
    with fastpeft.disable_adapters(model):
        expected = model(x)
        with (
            mock.patch.object(backend, "_interpreting", return_value=False),
            fastpeft.use_backend("triton"),
        ):
            torch.testing.assert_close(model(x), expected)


def test_a_linear_called_with_another_tensor_computes_its_own():
    model = patched(blocks(Attention()))
    x, other = torch.randn(2, 3, HIDDEN), torch.randn(2, 5, HIDDEN)
    expected = gradients(unfused(model)[0], x, other)
    for _ in range(shared.MAX_MISSES):
        for got, want in zip(gradients(model[0], x, other), expected, strict=True):
            assert_close(got, want)
    assert model[0]._fastpeft_siblings.runs == ()  # given up: it costs products that nobody wants
    assert (
        "0: to_q, to_k, to_v: not fused, because to_q, to_k, to_v were called with different tensors 3 times"
        in fastpeft.report(model).blocks
    )
    assert_close(model[0](x), unfused(model)[0](x))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Mlp(factor=2.0), "its forward is not down"),
        (Mlp(activation=F.relu), "its forward is not down"),
        (Mlp(activation=lambda x: F.silu(x).clamp(max=0.1)), "its forward is not down"),
        (FusedMlp(activation=lambda x: 2.0 * F.silu(x)), "its forward is not down"),
    ],
    ids=["factor", "relu", "clamp", "halves"],
)
def test_what_is_not_quite_a_gated_mlp_is_left_alone_and_reported(module, reason):
    plain = blocks(module)
    model = patched(plain)
    assert any(reason in line for line in fastpeft.report(model).blocks)
    assert "forward" not in model[0].__dict__
    x = torch.randn(3, HIDDEN)
    assert_close(model(x), unfused(model)(x))


def test_a_dropout_or_a_replaced_forward_keeps_a_module_as_it_is():
    dropping, replaced = Mlp(), Mlp()
    dropping.drop = nn.Dropout(0.5)
    plain = blocks(dropping, replaced)
    plain[1].forward = plain[1].forward
    lines = fastpeft.report(patched(plain)).blocks
    assert "0: like a gated MLP, but it has a dropout of its own" in lines
    assert "1: like a gated MLP, but its forward was replaced by other code" in lines


class Unread(Attention):
    """Its forward is written in a way that nothing can be read from."""


class Crossed(Attention):
    """k and v of a variable of their own, as in cross-attention."""

    def forward(self, x, other=None):
        current = x if other is None else other
        q, k, v = self.to_q(x), self.to_k(current), self.to_v(current)
        return self.out(q * torch.cat([k, v], dim=-1))


class Odd(nn.Linear):
    """A linear with a product of its own."""

    def forward(self, x):
        return 2.0 * super().forward(x)


def test_linears_side_by_side_that_are_not_fused_have_a_reason():
    def lines(module: nn.Module, **attributes) -> list[str]:
        plain = blocks(module)
        plain[0].__dict__.update(attributes)
        return [line for line in fastpeft.report(patched(plain)).blocks if "not fused" in line]

    alone = "no other linear that can be fused is called with"
    assert lines(Crossed()) == [
        f"0: to_q: not fused, because {alone} x",
        "0: out: not fused, because the forward of Crossed does not call it with a variable",
    ]
    assert lines(Attention()) == [f"0: out: not fused, because {alone} x"]
    Unread.forward = eval("lambda self, x: self.out(self.to_q(x))")
    assert lines(Unread()) == [
        "0: to_q, to_k, to_v, out: not fused, because the forward of Unread has no source to read"
    ]
    (line,) = lines(Attention(), forward=len)
    assert line.startswith(
        "0: to_q, to_k, to_v, out: not fused, because the forward of this Attention was repl"
    )


def test_a_linear_with_a_product_of_its_own_is_left_out_and_the_others_are_fused():
    odd = Attention()
    odd.to_q = Odd(HIDDEN, HIDDEN)
    gate = Mlp()
    gate.one = Odd(HIDDEN, WIDE, bias=False)
    model = patched(blocks(odd, gate))
    assert fastpeft.report(model).blocks == (
        "0: to_k, to_v share their input and are one op",
        "0: to_q: not fused, because Odd has a product of its own",
        "0: out: not fused, because no other linear that can be fused is called with x",
        "1: like a gated MLP, but of one: Odd has a product of its own",
        "1: one: not fused, because Odd has a product of its own",
        "1: two: not fused, because no other linear that can be fused is called with x",
        "1: back: not fused, because the forward of Mlp does not call it with a variable",
    )
    x = torch.randn(3, HIDDEN)
    for got, want in zip(gradients(model, x), gradients(unfused(model), x), strict=True):
        assert_close(got, want)


def test_hooks_on_a_linear_are_called():
    model = patched(blocks(Attention(), Mlp()))
    seen = []
    for path in ("0.to_k", "1.back", "1.two"):
        model.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: seen.append((path, o)))
    x = torch.randn(3, HIDDEN)
    y = model(x)
    assert [path for path, _ in seen] == ["0.to_k", "1.two", "1.back"]
    assert_close(seen[-1][1], y)
    assert_close(seen[0][1], unfused(model)[0].to_k(x))


def test_disabled_merged_mixed_and_several_adapters():
    model = patched(blocks(Attention(), Mlp()))
    fastpeft.add_adapter(model, "second", fastpeft.LoRA(r=1, target_modules=".*", init_lora_weights=False))
    x = torch.randn(3, HIDDEN)
    for names in ("default", ["default", "second"]):
        fastpeft.set_adapter(model, names)
        assert_close(model(x), unfused(model)(x))
        merged = fastpeft.merge(copy.deepcopy(model))(x)
        assert_close(merged, model(x))
    with fastpeft.disable_adapters(model):
        assert torch.equal(model(x), blocks(Attention(), Mlp())(x))
    with fastpeft.mixed_batch(model, ["default", "second", "__base__"]):
        assert_close(model(x), unfused(model)(x))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.2}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(options, reentrant):
    model = patched(blocks(Attention(), Mlp()), **options).train()
    x = torch.randn(4, HIDDEN, requires_grad=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        torch.manual_seed(3)
        direct = torch.autograd.grad(model(x).square().sum(), parameters)
        torch.manual_seed(3)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        for parameter, want in zip(parameters, direct, strict=True):
            assert torch.equal(parameter.grad, want)
            parameter.grad = None


@pytest.mark.parametrize("gate_first", [True, False])
def test_halves_of_one_linear_drop_the_same_elements(gate_first):
    """As the one linear does: its mask is of x, whatever it computes of it."""
    model = patched(blocks(FusedMlp(gate_first=gate_first, bias=True)), lora_dropout=0.4).train()
    x = torch.randn(3, 4, HIDDEN)
    results = []
    for which in (model, unfused(model)):
        torch.manual_seed(5)
        results.append(gradients(which, x))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("in_place", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.4}], ids=str)
def test_halves_keep_g_and_u_alone(options, in_place):
    """Not the linear's output, the activation and h, which the module's own forward keeps."""
    model = blocks(FusedMlp())
    if in_place:
        model = fastpeft.patch(
            with_adapters(model, [{"r": 2, "target_modules": ["both", "back"], **options}])
        )
    else:
        model = patched(model, **options)
    model.train()
    x = torch.randn(50, HIDDEN)
    storages = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    kept = sum(n for place, n in storages.items() if place not in parameters | {x.data_ptr()})
    g_and_u, S = 4 * len(x) * 2 * WIDE, 4 * len(x) * 3 * 2
    if "use_dora" in options:
        norms = 4 * (2 * WIDE + HIDDEN)
        assert kept == g_and_u + S + norms + 4 * y.numel()
    else:
        assert kept == g_and_u + S + (3 * 8 if "lora_dropout" in options else 0)


def test_one_linear_for_q_k_and_v_is_reported():
    model = patched(blocks(FusedAttention(), FusedMlp()))
    assert fastpeft.report(model).blocks == (
        "0: qkv is several linears in one already: one op reads its input once for all",
        "0: out: not fused, because the forward of FusedAttention does not call it with a variable",
        "1: both (gate and up) and back are one op (silu)",
    )


def test_phi3_s_fused_projections_are_found():
    model = fastpeft.patch(ARCHITECTURES["phi3"][0](), fastpeft.LoRA(r=2))
    assert one_ops(model)[:2] == [
        "model.layers.0.self_attn: "
        "qkv_proj is several linears in one already: one op reads its input once for all",
        "model.layers.0.mlp: gate_up_proj (gate and up) and down_proj are one op (silu)",
    ]


def test_copies_and_pickles_are_blocks_of_their_own():
    model = patched(blocks(Attention(), Mlp()))
    x = torch.randn(2, HIDDEN)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(one_ops(twin)) == 2
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(x).any()
    assert torch.equal(model(x), expected)
    fastpeft.unpatch(model)
    assert not list(described(model))
    assert "forward" not in model[1].__dict__
    assert torch.equal(model(x), blocks(Attention(), Mlp())(x))


def test_only_modules_with_adapters_are_touched():
    model = fastpeft.patch(blocks(Attention(), Mlp()), fastpeft.LoRA(r=2, target_modules=["to_q", "to_v"]))
    assert one_ops(model) == ["0: to_q, to_v share their input and are one op"]
    one = fastpeft.patch(blocks(Mlp()), fastpeft.LoRA(r=2, target_modules=["back"], init_lora_weights=False))
    assert len(one_ops(one)) == 1
    x = torch.randn(3, HIDDEN)
    assert_close(one(x), unfused(one)(x))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_peft_models_in_place(options):
    untouched = peft_model(**options)
    model = fastpeft.patch(copy.deepcopy(untouched))
    assert len(one_ops(model)) == 4
    assert_same_as_peft(model, untouched)
    before = dict(fastpeft.report(model).calls)
    model(tokens())
    assert fastpeft.report(model).calls["fused"] - before["fused"] == 14
    model.add_adapter("new", LoraConfig(target_modules=["lm_head"]))
    model.set_adapter("new")
    untouched.add_adapter("new", LoraConfig(target_modules=["lm_head"]))
    untouched.set_adapter("new")
    model.base_model.model.lm_head.lora_A["new"].load_state_dict(
        untouched.base_model.model.lm_head.lora_A["new"].state_dict()
    )
    assert_close(model(tokens()).logits, untouched(tokens()).logits)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_halves_in_peft_models(options):
    options = {"r": 2, "target_modules": ["both", "back"], **options}
    untouched = with_adapters(blocks(FusedMlp(bias=True)), [options])
    model = fastpeft.patch(copy.deepcopy(untouched))
    assert fastpeft.report(model).blocks == (
        "base_model.model.0: both (gate and up) and back are one op (silu)",
    )
    x = torch.randn(3, 4, HIDDEN)
    with mock.patch.object(gated, "gated_mlp", wraps=gated.gated_mlp) as one_op:
        found = gradients(model, x)
        assert one_op.call_count == 1
    for got, want in zip(found, gradients(untouched, x), strict=True):
        assert_close(got, want)
    model.merge_adapter()
    untouched.merge_adapter()
    assert_close(model(x), untouched(x))


def test_compiles_whole():
    for model in (
        fastpeft.patch(llama(), fastpeft.LoRA(r=2)),
        fastpeft.patch(get_peft_model(llama(), LoraConfig())),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(tokens()).logits, model(tokens()).logits)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(tokens())
