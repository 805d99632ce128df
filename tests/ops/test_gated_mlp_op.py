"""The gated MLP: formulas, gradients, mixed adapters, dropout, what is saved, compile, errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.ops import gated_mlp_torch, packed
from fastpeft.ops.gated_mlp import activated, gated_mlp, gated_mlp_reference
from fastpeft.ops.projections import linear, with_norm
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.ops import blocks
from tests.ops.blocks import leaves, projection, trained
from tests.tolerance import assert_within_rule

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
LORA, DORA, BASE = "lora", "dora", "base"
# batch dimensions, in_features, d_ff, out_features, then rank, kind and bias of gate, up and down
BLOCKS = [
    pytest.param((8,), 16, 32, 16, [(4, LORA, False)] * 3, id="lora"),
    pytest.param((5, 21), 23, 37, 19, [(5, LORA, True), (1, LORA, False), (3, LORA, True)], id="ragged"),
    pytest.param((200, 2), 15, 22, 15, [(3, DORA, False), (2, DORA, True), (4, DORA, False)], id="dora"),
    pytest.param((11,), 9, 12, 10, [(20, DORA, False), (0, BASE, True), (1, DORA, True)], id="mixed"),
    pytest.param((11,), 9, 12, 10, [(0, BASE, False), (20, LORA, False), (0, BASE, True)], id="up-only"),
    pytest.param((7,), 9, 12, 10, [(0, BASE, False)] * 3, id="no-adapters"),
    pytest.param((2, 0), 9, 12, 10, [(2, LORA, False), (2, DORA, False), (2, DORA, True)], id="zero-tokens"),
]


TORCH = ["torch-native", "torch-fp32"]
# The kernels' numerics are tests/kernels' concern, and the interpreter is slow: here one case of each kind.
every_way = pytest.mark.parametrize("backend", [*TORCH, "torch-few"], indirect=True)
with_triton = pytest.mark.parametrize("backend", [*TORCH, "triton"], indirect=True)
only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(params=TORCH, autouse=True)
def backend(request: pytest.FixtureRequest, force_products, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    torch._dynamo.reset()  # its limit of recompilations counts over tests
    name, _, way = request.param.partition("-")
    force_products(way)
    monkeypatch.setattr(gated_mlp_torch, "CHUNK_ELEMENTS", 64)  # several chunks, and a ragged last one
    with interpreter.mended(), fastpeft.use_backend(name):
        yield name


def problem(batch, k, f, n, kinds, dtype, adapter=None):
    x = torch.randn(*batch, k, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    sizes = [(f, k), (f, k), (n, f)]
    projections = [
        projection(out, into, r, kind, bias=bias, dtype=dtype, adapter=adapter, scaling=0.5 + 0.2 * i)
        for i, ((out, into), (r, kind, bias)) in enumerate(zip(sizes, kinds, strict=True))
    ]
    # Gate and up of one shape, but not of one value.
    projections[1] = replace(projections[1], weight=projections[1].weight.flip(0).contiguous())
    return x, projections


def small(dtype=torch.float32, kinds=((4, LORA, True), (2, DORA, False), (3, DORA, False)), adapter=None):
    return problem((3, 4), 10, 12, 8, kinds, dtype, adapter)


def ours(x, projections, **options):
    return gated_mlp(x, *projections, **options)


def reference(x, projections, **options):
    return gated_mlp_reference(x, *projections, **options)


def run(function, x, projections, dtype=None, masks=None, **options) -> list[Tensor]:
    """Return y and the gradients of x and of every parameter for a fixed dY."""
    own = x.dtype
    x = (x if dtype is None else x.to(dtype)).detach().clone().requires_grad_()
    projections = leaves(projections, dtype)
    if masks is not None:
        options["masks"] = [m.to(x.dtype) for m in masks]
    y = function(x, projections, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, own).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *trained(projections)], dy)]


def check(x, projections, masks=None, seed=None, **options) -> None:
    if seed is not None:
        torch.manual_seed(seed)
    results = run(ours, x, projections, **options)
    options.pop("dropout_p", None)
    exact = run(reference, x, projections, torch.float64, masks, **options)
    plain = run(reference, x, projections, x.dtype, masks, **options)
    names = ["y", "x", *blocks.names(projections)]
    for name, result, expected, baseline in zip(names, results, exact, plain, strict=True):
        assert_within_rule(result, expected, baseline, name)


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "k", "f", "n", "kinds"), BLOCKS)
def test_two_times_rule(batch, k, f, n, kinds, dtype):
    check(*problem(batch, k, f, n, kinds, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    kinds = [(4, LORA, True), (2, DORA, False), (3, DORA, False)]
    check(*problem((6, 30), 20, 28, 22, kinds, dtype), activation=activation)


@only_triton
@pytest.mark.parametrize(("batch", "k", "f", "n", "kinds"), BLOCKS)
def test_two_times_rule_by_kernels(batch, k, f, n, kinds):
    check(*problem(batch[-1:], k, f, n, kinds, torch.bfloat16))


@with_triton
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_fp32_adapters_on_a_16_bit_base(dtype):
    x, projections = problem(
        (3, 50), 23, 36, 19, [(5, LORA, True), (3, DORA, False), (4, DORA, True)], dtype, torch.float32
    )
    check(x, projections)
    y, _, *gradients = run(ours, x, projections)
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [t.dtype for t in trained(projections)]


@with_triton
@pytest.mark.parametrize("layout", ["transposed-tokens", "strided-features", "conv1d-weight"])
def test_strided_inputs(layout):
    x, projections = small()
    expected = run(reference, x, projections)
    if layout == "transposed-tokens":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided-features":
        x = torch.repeat_interleave(x, 2, dim=-1)[..., ::2]
    else:
        projections = [replace(p, weight=p.weight.t().contiguous().t()) for p in projections]
    for t in (x, *trained(projections)):
        t.requires_grad_()
    y = ours(x, projections)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    dy = dy.transpose(0, 1).contiguous().transpose(0, 1)  # rows out of order
    torch.testing.assert_close([y, *torch.autograd.grad(y, [x, *trained(projections)], dy)], expected)


@with_triton
@pytest.mark.parametrize("wanted", range(10))
def test_only_the_gradient_asked_for(wanted):
    x, projections = small()
    every = [x, *trained(projections)]
    leaf = every[wanted].requires_grad_()
    ours(x, projections).square().sum().backward()
    assert [t.grad is not None for t in every] == [t is leaf for t in every]
    (expected,) = torch.autograd.grad(reference(x, projections).square().sum(), leaf)
    torch.testing.assert_close(leaf.grad, expected)


def saved_bytes(x, projections, **options) -> dict[int, int]:
    """The storages that forward keeps for backward, the parameters' own left out."""
    given = [t for p in projections for t in (p.weight, p.norm) if t is not None] + trained(projections)
    parameters = {t.untyped_storage().data_ptr() for t in given}
    saved = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ours(x, projections, **options)
    del y
    return saved


@with_triton
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
def test_lora_saves_x_s_g_and_u(dropout_p):
    x, projections = problem((64,), 24, 40, 16, [(4, LORA, True)] * 3, torch.bfloat16, torch.float32)
    saved = saved_bytes(x, leaves(projections), dropout_p=dropout_p)
    seeds = 3 * 8 if dropout_p else 0
    assert sum(saved.values()) == 2 * 64 * (24 + 3 * 4 + 2 * 40) + seeds
    assert x.untyped_storage().data_ptr() in saved


@with_triton
def test_dora_saves_the_output_and_the_norms_more():
    kinds = [(4, DORA, False)] * 3
    x, projections = problem((64,), 24, 40, 16, kinds, torch.bfloat16, torch.float32)
    projections = leaves(projections)
    own = 2 * 64 * (24 + 3 * 4 + 2 * 40)
    with_norms = [with_norm(p) for p in projections]
    assert sum(saved_bytes(x, with_norms).values()) == own + 2 * 64 * 16  # y
    assert sum(saved_bytes(x, projections).values()) == own + 2 * 64 * 16 + 4 * (40 + 40 + 16)
    x, projections = problem((64,), 24, 40, 16, [(4, DORA, True)] * 3, torch.bfloat16, torch.float32)
    with_norms = [with_norm(p) for p in leaves(projections)]
    assert sum(saved_bytes(x, with_norms).values()) == own + 2 * 64 * (40 + 40 + 16)  # every z, and no y


@with_triton
def test_frozen_parts_save_nothing():
    x, projections = problem((64,), 24, 40, 16, [(4, LORA, False)] * 3, torch.float32)
    projections[2] = leaves(projections[2:])[0]
    saved = saved_bytes(x, projections)  # only down trains: g and u for h, and no x
    assert sum(saved.values()) == 4 * 64 * (3 * 4 + 2 * 40)
    projections[2].lora_A.requires_grad_(False)
    assert sum(saved_bytes(x, projections).values()) == 4 * 64 * 3 * 4  # only down's lora_B: S


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_drawn_again_in_backward(dtype, backend):
    kinds = [(4, LORA, True), (3, LORA, False), (2, LORA, True)]
    x, projections = problem((8, 25), 16, 24, 19, kinds, dtype)
    masks = blocks.dropout_masks([(8, 25, 16), (8, 25, 16), (8, 25, 24)], [0.3] * 3, 7, dtype, backend)
    assert not torch.equal(masks[0], masks[1])  # a mask for every projection
    check(x, projections, masks, seed=7, dropout_p=0.3)


@with_triton
@pytest.mark.parametrize("ps", [[0.3, 0.6, 0.0], [0.0, 0.0, 0.4], [0.2, 0.2, 0.5]], ids=str)
def test_every_projection_may_have_a_probability_of_its_own(ps, backend):
    x, projections = problem(
        (4, 25), 40, 60, 44, [(4, LORA, True), (2, DORA, False), (3, LORA, False)], torch.float32
    )
    masks = blocks.dropout_masks([(4, 25, 40), (4, 25, 40), (4, 25, 60)], ps, 7, torch.float32, backend)
    check(x, projections, masks, seed=7, dropout_p=ps, dropout_on_base=False)


@with_triton
def test_dropout_on_adapters_only(backend):
    kinds = [(4, LORA, True), (2, DORA, False), (3, DORA, False)]
    x, projections = problem((4, 25), 40, 60, 44, kinds, torch.float32)
    masks = blocks.dropout_masks(
        [(4, 25, 40), (4, 25, 40), (4, 25, 60)], [0.3] * 3, 7, torch.float32, backend
    )
    check(x, projections, masks, seed=7, dropout_p=0.3, dropout_on_base=False)


@with_triton
def test_dora_with_dropout_is_the_single_ops():
    x, projections = small()

    def singles(x, projections):
        gate, up, down = projections
        return linear(activated(linear(x, gate, 0.3), "silu") * linear(x, up, 0.3), down, 0.3)

    torch.manual_seed(7)
    got = run(ours, x, projections, dropout_p=0.3)
    torch.manual_seed(7)
    for g, w in zip(got, run(singles, x, projections), strict=True):
        assert torch.equal(g, w)


@with_triton
@pytest.mark.parametrize("dropout_p", [0.0, 0.5], ids=["plain", "dropout"])
def test_activation_checkpointing(dropout_p):
    x, projections = small()
    x, projections = x.requires_grad_(), leaves(projections)
    inputs = [x, *trained(projections)]

    def forward(x):
        return ours(x, projections, dropout_p=dropout_p, dropout_on_base=False).square()

    torch.manual_seed(2)
    direct = torch.autograd.grad(forward(x).sum(), inputs)
    torch.manual_seed(2)
    y = checkpoint(forward, x, use_reentrant=False)
    torch.rand(100)  # the generator moves on before the recomputation
    for got, want in zip(torch.autograd.grad(y.sum(), inputs), direct, strict=True):
        assert torch.equal(got, want)


@with_triton
def test_backward_twice_gives_the_same_bits():
    x, projections = small(torch.bfloat16, adapter=torch.float32)
    projections = leaves(projections)
    y = ours(x, projections).sum()
    # Nothing that is saved may be written over by the first pass.
    first = torch.autograd.grad(y, trained(projections), retain_graph=True)
    second = torch.autograd.grad(y, trained(projections))
    again = torch.autograd.grad(ours(x, projections).sum(), trained(projections))
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
def test_gradcheck_fp64(activation, dropout_p):
    x, projections = problem(
        (2, 2), 3, 4, 3, [(2, LORA, True), (1, DORA, True), (2, DORA, False)], torch.float64
    )
    # DoRA's c is detached, as in the paper's section 4.3: with the norm given, numbers see it so too.
    projections = [with_norm(p) for p in leaves(projections)]
    inputs = [x.requires_grad_(), *trained(projections)]

    def function(*_):
        torch.manual_seed(0)
        return ours(x, projections, activation=activation, dropout_p=dropout_p, dropout_on_base=False)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("gate", [BASE, LORA, DORA])
@pytest.mark.parametrize("down", [BASE, LORA, DORA])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_fp64_gradients_are_plain_autograds(gate, down, bias):
    x, projections = small(torch.float64, ((2, gate, bias), (3, DORA, bias), (1, down, bias)))
    got, want = run(ours, x, projections), run(reference, x, projections)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@with_triton
@pytest.mark.parametrize("seeded", [False, True], ids=["plain", "dropout"])
def test_opcheck(seeded, backend):
    x, projections = small(kinds=((4, LORA, True), (2, DORA, True), (3, DORA, False)))
    projections = leaves(projections)
    projections[1] = with_norm(projections[1])  # one norm given, the other left to the op
    seeds = torch.tensor([3, 4, 5], device=DEVICE if backend == "triton" else "cpu") if seeded else None
    ps = [0.3, 0.3, 0.3] if seeded else [0.0] * 3
    arguments = (x.requires_grad_(), *packed.pack(projections), "silu", ps, None, seeds, True, backend)
    torch.library.opcheck(torch.ops.fastpeft.gated_mlp.default, arguments)


@with_triton
@pytest.mark.parametrize("kind", [LORA, DORA, BASE])
def test_compiles_without_graph_breaks(kind):
    x, projections = small(kinds=((4, kind, True), (2, kind, False), (3, kind, False)))
    compiled = torch.compile(gated_mlp, backend="aot_eager", fullgraph=True)
    traced = run(lambda x, projections: compiled(x, *projections), x, projections)
    torch.testing.assert_close(traced, run(ours, x, projections))


def test_one_graph_serves_every_length():
    _, projections = small()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(gated_mlp, backend=count, dynamic=True, fullgraph=True)
    for length in (5, 7, 11, 13):  # none of them a size of the projections: dynamo would tie them
        x = torch.randn(2, length, 10).to(DEVICE)
        torch.testing.assert_close(compiled(x, *projections), ours(x, projections))
    assert len(graphs) == 1


def test_autocast_computes_in_its_dtype_compiled_or_not():
    x, projections = small()
    compiled = torch.compile(gated_mlp, backend="aot_eager", fullgraph=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = run(ours, x, projections)
        traced = run(lambda x, projections: compiled(x, *projections), x, projections)
    assert inside[0].dtype is torch.bfloat16
    assert {t.dtype for t in inside[1:]} == {torch.float32}
    for a, b in zip(inside, traced, strict=True):
        assert torch.equal(a, b)
    for y, exact in zip(inside, run(ours, x, projections), strict=True):
        torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=1e-1)


@with_triton
def test_no_gradient_wanted_none_kept():
    x, projections = small()
    with torch.no_grad():
        y = ours(x, leaves(projections))
    assert not y.requires_grad
    torch.testing.assert_close(y, reference(x, projections))


def test_a_trainable_base_weight_gets_its_gradient():
    x, projections = small()
    weights = [p.weight.requires_grad_() for p in projections]
    got = torch.autograd.grad(ours(x, projections).square().sum(), weights)
    want = torch.autograd.grad(reference(x, projections).square().sum(), weights)
    torch.testing.assert_close(got, want)


# The kernels in every dtype: tests/kernels/test_glu.py.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((way, dtype) for way in TORCH for dtype in DTYPES), ("triton", torch.bfloat16)],
    indirect=["backend"],
    ids=str,
)
def test_magnitude_zero_and_zero_rows(dtype):
    x, projections = problem((60,), 20, 28, 22, [(4, DORA, False)] * 3, dtype, torch.float32)
    for i, p in enumerate(projections):
        magnitude = p.magnitude.clone()
        magnitude[2] *= 3  # c is far from 1 with and without the guard: one way of scaling for both
        projections[i] = replace(p, magnitude=magnitude)
    clean = run(ours, x, projections)
    magnitudes = [2 + blocks.names(projections).index(f"magnitude of {i}") for i in range(3)]

    def guarded(p):
        magnitude, weight, lora_B = p.magnitude.clone(), p.weight.clone(), p.lora_B.clone()
        magnitude[3], magnitude[4] = 0.0, 1e-35
        yield replace(p, magnitude=magnitude)
        weight[5], lora_B[5] = 0.0, 0.0
        yield replace(p, magnitude=magnitude, weight=weight, lora_B=lora_B)

    for i, p in enumerate(projections):
        for rows, changed in zip(((3, 4), (3, 4, 5)), guarded(p), strict=True):
            guards = [*projections[:i], changed, *projections[i + 1 :]]
            if len(rows) == 2:  # the reference divides by the norm of a zero row
                check(x, guards)
            found = run(ours, x, guards)
            for result in found:
                assert torch.isfinite(result).all()
            # Of gate and up every gradient by row, of down its outputs too: no other row's bits move.
            at = magnitudes[i]
            others = [j for j in range(len(changed.magnitude)) if j not in rows]
            assert torch.equal(found[at][others], clean[at][others])
            if i == 2:
                assert torch.equal(found[0][:, others], clean[0][:, others])


def test_meta_tensors_give_shapes():
    x, projections = small()
    on_meta = [
        replace(p, **{f: None if (t := getattr(p, f)) is None else t.to("meta") for f in packed.FIELDS})
        for p in projections
    ]
    assert ours(x.to("meta"), on_meta).shape == (3, 4, 8)


@pytest.mark.parametrize(
    ("which", "changes", "said"),
    [
        (
            0,
            {"lora_A": torch.zeros(4, 9, device=DEVICE)},
            r"gate: expected lora_A \[r, 10\].*got lora_A \[4, 9\]",
        ),
        (1, {"bias": torch.zeros(7, device=DEVICE)}, r"up: expected bias \[12\], got \[7\]"),
        (1, {"magnitude": torch.zeros(7, device=DEVICE)}, r"up: expected magnitude \[12\], got \[7\]"),
        (2, {"weight": torch.zeros(8, 11, device=DEVICE)}, r"down: .*x \[3, 4, 12\] and weight \[8, 11\]"),
        (2, {"lora_A": None, "lora_B": None}, r"down: expected lora_A and lora_B beside a magnitude"),
    ],
)
def test_what_does_not_fit_is_named(which, changes, said):
    x, projections = small()
    projections[which] = replace(projections[which], **changes)
    with pytest.raises(fastpeft.ShapeError, match=said):
        ours(x, projections)


def test_gate_and_up_of_different_widths():
    x, projections = small()
    projections[1] = projection(13, 10, 2)
    with pytest.raises(fastpeft.ShapeError, match=r"up: .* like gate's, \[12, 10\], got \[13, 10\]"):
        ours(x, projections)


def test_an_unknown_activation():
    x, projections = small()
    with pytest.raises(fastpeft.ConfigError, match=r"silu, gelu, gelu_tanh, got 'relu'"):
        ours(x, projections, activation="relu")


@pytest.mark.parametrize("kind", [LORA, DORA])
def test_torch_func_sees_through(kind):
    x, projections = small(kinds=((4, kind, True), (2, LORA, False), (3, kind, False)))

    def loss(x: Tensor, lora_A: Tensor) -> Tensor:
        return ours(x, [replace(projections[0], lora_A=lora_A), *projections[1:]]).square().sum()

    leaves = [x.clone().requires_grad_(), projections[0].lora_A.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1))(x, projections[0].lora_A)
    torch.testing.assert_close(got, expected)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))
    torch.testing.assert_close(per_sample(x[:, None], projections[0].lora_A).sum(0), expected[1])
