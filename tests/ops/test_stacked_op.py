"""The stacked linears: formulas, gradients, mixed adapters, dropout, what is saved, compile, errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.ops import native, packed, stacked_torch
from fastpeft.ops.projections import linear, with_norm
from fastpeft.ops.stacked import stacked_linear, stacked_linear_reference
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.ops import blocks
from tests.ops.blocks import leaves, projection, trained
from tests.tolerance import assert_within_rule

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# batch dimensions, in_features, then for every projection: out_features, rank, kind, bias
LORA, DORA, BASE = "lora", "dora", "base"
BLOCKS = [
    pytest.param((8,), 16, [(32, 4, LORA, False)] * 3, id="qkv"),
    pytest.param((3, 5), 23, [(37, 5, LORA, True), (9, 3, LORA, True), (9, 1, LORA, False)], id="gqa"),
    pytest.param((200, 2), 23, [(36, 5, DORA, False), (9, 2, DORA, True), (9, 1, DORA, False)], id=DORA),
    pytest.param((11,), 20, [(16, 40, DORA, False), (8, 0, BASE, True), (12, 30, LORA, True)], id="mixed"),
    pytest.param((7,), 12, [(10, 0, BASE, True), (6, 0, BASE, False)], id="no-adapters"),
    pytest.param((90,), 12, [(30, 1, DORA, True)], id="one"),
    pytest.param((2, 0), 12, [(10, 3, LORA, False), (6, 2, DORA, True)], id="zero-tokens"),
    # Wide: over 6 magnitudes the ratio of two rounding errors is chance and differs between BLAS libraries.
    pytest.param((9,), 12, [(80, 2, LORA, False), (60, 1, DORA, False)] * 2, id="four"),
]


TORCH = ["torch-native", "torch-fp32"]
# The kernels' numerics are tests/kernels' concern, and the interpreter is slow: here one case of each kind.
every_way = pytest.mark.parametrize("backend", [*TORCH, "torch-few"], indirect=True)
with_triton = pytest.mark.parametrize("backend", [*TORCH, "triton"], indirect=True)
only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(params=TORCH, autouse=True)
def backend(request: pytest.FixtureRequest, force_products) -> Iterator[str]:
    torch._dynamo.reset()  # its limit of recompilations counts over tests
    name, _, way = request.param.partition("-")
    force_products(way)
    with interpreter.mended(), fastpeft.use_backend(name):
        yield name


def problem(batch, k, shapes, dtype, adapter=None):
    x = torch.randn(*batch, k, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    return x, [projection(n, k, r, kind, bias=b, dtype=dtype, adapter=adapter) for n, r, kind, b in shapes]


def run(function, x, projections, dtype=None, masks=None, **options) -> list[Tensor]:
    """Return the ys and the gradients of x and of every parameter for fixed dYs."""
    own = x.dtype
    x = (x if dtype is None else x.to(dtype)).detach().clone().requires_grad_()
    projections = leaves(projections, dtype)
    if masks is not None:
        options["masks"] = [m.to(x.dtype) for m in masks]
    ys = function(x, projections, **options)
    g = torch.Generator().manual_seed(5)
    dys = [torch.randn(y.shape, generator=g).to(DEVICE, own).to(y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, [x, *trained(projections)], dys)]


def check(x, projections, masks=None, seed=None, **options) -> None:
    if seed is not None:
        torch.manual_seed(seed)
    results = run(stacked_linear, x, projections, **options)
    options.pop("dropout_p", None)
    exact = run(stacked_linear_reference, x, projections, torch.float64, masks, **options)
    plain = run(stacked_linear_reference, x, projections, x.dtype, masks, **options)
    names = [*(f"y of {i}" for i in range(len(projections))), "x", *blocks.names(projections)]
    for name, result, expected, baseline in zip(names, results, exact, plain, strict=True):
        assert_within_rule(result, expected, baseline, name)


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "k", "shapes"), BLOCKS)
def test_two_times_rule(batch, k, shapes, dtype):
    check(*problem(batch, k, shapes, dtype))


@only_triton
@pytest.mark.parametrize(("batch", "k", "shapes"), BLOCKS)
def test_two_times_rule_by_kernels(batch, k, shapes):
    check(*problem(batch[-1:], k, shapes, torch.bfloat16))


@with_triton
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", [LORA, DORA])
def test_fp32_adapters_on_a_16_bit_base(kind, dtype):
    shapes = [(37, 5, kind, True), (9, 3, kind, False)]
    x, projections = problem((3, 50), 23, shapes, dtype, torch.float32)
    check(x, projections)
    ys, gradients = (results := run(stacked_linear, x, projections))[:2], results[3:]
    assert {y.dtype for y in ys} == {dtype}
    assert [g.dtype for g in gradients] == [t.dtype for t in trained(projections)]


@with_triton
@pytest.mark.parametrize("layout", ["transposed-tokens", "strided-features", "conv1d-weight"])
def test_strided_inputs(layout):
    x, projections = problem((4, 6), 16, [(12, 4, LORA, True), (8, 2, DORA, False)], torch.float32)
    expected = run(stacked_linear_reference, x, projections)
    if layout == "transposed-tokens":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided-features":
        x = torch.repeat_interleave(x, 2, dim=-1)[..., ::2]
    else:
        projections = [replace(p, weight=p.weight.t().contiguous().t()) for p in projections]
    x.requires_grad_()
    for t in trained(projections):
        t.requires_grad_()
    ys = stacked_linear(x, projections)
    g = torch.Generator().manual_seed(5)
    dys = [torch.randn(y.shape, generator=g).to(DEVICE) for y in ys]
    dys[0] = dys[0].transpose(0, 1).contiguous().transpose(0, 1)  # rows out of order
    got = [*ys, *torch.autograd.grad(ys, [x, *trained(projections)], dys)]
    torch.testing.assert_close(got, expected)


@with_triton
@pytest.mark.parametrize("wanted", [None, *range(9)], ids=lambda i: "x" if i is None else f"parameter-{i}")
def test_only_the_gradient_asked_for(wanted):
    shapes = [(12, 3, DORA, True), (8, 2, LORA, False), (6, 2, DORA, False)]
    x, projections = problem((3, 4), 10, shapes, torch.float32)
    every = trained(projections)
    leaf = x if wanted is None else every[wanted]
    leaf.requires_grad_()
    sum(y.square().sum() for y in stacked_linear(x, projections)).backward()
    assert [t.grad is not None for t in (x, *every)] == [t is leaf for t in (x, *every)]
    total = sum(y.square().sum() for y in stacked_linear_reference(x, projections))
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(leaf.grad, expected)


def test_the_gradients_of_the_outputs_are_not_written_over():
    x, projections = problem((6,), 10, [(12, 3, DORA, True), (8, 2, DORA, False)], torch.float32)
    projections = leaves(projections)
    ys = stacked_linear(x.requires_grad_(), projections)
    dys = [torch.randn_like(y) for y in ys]
    before = [dy.clone() for dy in dys]
    torch.autograd.grad(ys, [x, *trained(projections)], dys)
    for dy, was in zip(dys, before, strict=True):
        assert torch.equal(dy, was)


@with_triton
def test_a_loss_may_reach_one_output_only():
    x, projections = problem((3, 4), 10, [(12, 3, DORA, True), (8, 2, LORA, False)], torch.float32)
    x, projections = x.requires_grad_(), leaves(projections)
    inputs = [x, *trained(projections)]
    got, want = (
        torch.autograd.grad(op(x, projections)[1].square().sum(), inputs, allow_unused=True)
        for op in (stacked_linear, stacked_linear_reference)
    )
    assert [g is None for g in got] == [w is None for w in want], "zeros would be decayed, None is not"
    reached = [(g, w) for g, w in zip(got, want, strict=True) if w is not None]
    torch.testing.assert_close(*zip(*reached, strict=True))


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
        outputs = stacked_linear(x, projections, **options)
    del outputs
    return saved


@with_triton
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
def test_lora_saves_x_and_s(dropout_p):
    shapes = [(32, 4, LORA, True), (16, 3, LORA, False), (16, 0, BASE, True)]
    x, projections = problem((64,), 24, shapes, torch.bfloat16, torch.float32)
    saved = saved_bytes(x, leaves(projections), dropout_p=dropout_p)
    seeds = 3 * 8 if dropout_p else 0
    assert sum(saved.values()) == 2 * 64 * 24 + 2 * 64 * 7 + seeds
    assert x.untyped_storage().data_ptr() in saved


@with_triton
def test_dora_saves_one_output_or_z_and_the_norm():
    shapes = [(32, 4, DORA, True), (16, 3, DORA, False)]
    x, projections = problem((64,), 24, shapes, torch.bfloat16, torch.float32)
    own = 2 * 64 * 24 + 2 * 64 * 7 + 2 * 64 * (32 + 16)
    projections = leaves(projections)
    assert sum(saved_bytes(x, projections).values()) == own + 4 * (32 + 16)  # and the norms it computed
    with_norms = [with_norm(p) for p in projections]
    assert sum(saved_bytes(x, with_norms).values()) == own
    for p in projections:
        p.magnitude.requires_grad_(False)
    assert sum(saved_bytes(x, projections).values()) == own - 2 * 64 * (32 + 16) + 4 * (32 + 16)


def test_a_frozen_lora_a_saves_no_input():
    x, projections = problem((64,), 24, [(32, 4, LORA, False), (16, 3, LORA, False)], torch.float32)
    projections = leaves(projections)
    assert x.untyped_storage().data_ptr() in saved_bytes(x, projections)
    for p in projections:
        p.lora_A.requires_grad_(False)
    assert x.untyped_storage().data_ptr() not in saved_bytes(x, projections)


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_drawn_again_in_backward(dtype, backend):
    x, projections = problem(
        (4, 25), 16, [(12, 4, LORA, True), (8, 0, BASE, False), (8, 2, LORA, False)], dtype
    )
    masks = blocks.dropout_masks([(4, 25, 16)] * 3, [0.3] * 3, 7, dtype, backend)
    assert not torch.equal(masks[0], masks[2])  # a mask for every projection
    check(x, projections, masks, seed=7, dropout_p=0.3)


@with_triton
def test_every_projection_may_have_a_probability_of_its_own(backend):
    shapes = [(60, 4, LORA, True), (44, 3, DORA, False), (44, 2, LORA, False)]
    x, projections = problem((4, 25), 40, shapes, torch.float32)
    ps = [0.3, 0.6, 0.0]
    masks = blocks.dropout_masks([(4, 25, 40)] * 3, ps, 7, torch.float32, backend)
    check(x, projections, masks, seed=7, dropout_p=ps, dropout_on_base=False)
    with pytest.raises(fastpeft.ShapeError, match="expected one probability, or 3"):
        stacked_linear(x, projections, dropout_p=ps[:2])


@with_triton
def test_dropout_on_adapters_only(backend):
    x, projections = problem((4, 25), 40, [(60, 4, DORA, True), (44, 2, LORA, False)], torch.float32)
    masks = blocks.dropout_masks([(4, 25, 40)] * 2, [0.3] * 2, 7, torch.float32, backend)
    check(x, projections, masks, seed=7, dropout_p=0.3, dropout_on_base=False)


@with_triton
def test_dora_with_dropout_is_the_single_ops():
    x, projections = problem((4, 25), 16, [(12, 4, DORA, True), (8, 2, LORA, False)], torch.float32)
    torch.manual_seed(7)
    got = run(stacked_linear, x, projections, dropout_p=0.3)
    torch.manual_seed(7)
    want = run(lambda x, ps: tuple(linear(x, p, 0.3) for p in ps), x, projections)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("backend", ["torch-native"], indirect=True)
@pytest.mark.parametrize("tokens", [50, 100])
def test_with_many_tokens_c_scales_the_weight(tokens, backend, monkeypatch):
    """Of DoRA alone, forward and backward; y and dY, which are larger then, have no pass of their own."""
    x, projections = problem((tokens,), 40, [(60, 4, DORA, False), (44, 2, LORA, False)], torch.float32)
    passes = []
    for module in (native, stacked_torch):
        original = module.scale_features

        def spy(y, *args, original=original, **options):
            passes.append(tuple(y.shape))
            return original(y, *args, **options)

        monkeypatch.setattr(module, "scale_features", spy)
    run(stacked_linear, x, projections)
    assert passes == 2 * [(40, 60) if tokens == 100 and x.is_cpu else (tokens, 60)]


def test_half_of_the_elements_are_dropped_and_the_mean_is_kept():
    k, tokens = 64, 400
    eye = projection(k, k, k)
    unit = torch.eye(k, device=DEVICE)
    eye = replace(eye, weight=torch.zeros_like(unit), lora_A=unit, lora_B=unit.clone(), scaling=1.0)
    torch.manual_seed(0)
    first, second = stacked_linear(torch.ones(tokens, k, device=DEVICE), [eye, eye], dropout_p=0.5)
    for y in (first, second):
        assert set(y.unique().tolist()) == {0.0, 2.0}
        assert abs(y.mean().item() - 1.0) < 5 * 1.0 / (tokens * k) ** 0.5  # five standard deviations
    assert abs(((first > 0) & (second > 0)).float().mean().item() - 0.25) < 5 * 0.44 / (tokens * k) ** 0.5


@with_triton
@pytest.mark.parametrize("dropout_p", [0.0, 0.5], ids=["plain", "dropout"])
def test_activation_checkpointing(dropout_p):
    x, projections = problem((6,), 16, [(12, 4, LORA, True), (8, 2, DORA, False)], torch.float32)
    x, projections = x.requires_grad_(), leaves(projections)
    inputs = [x, *trained(projections)]

    def forward(x):
        ys = stacked_linear(x, projections, dropout_p=dropout_p, dropout_on_base=False)
        return sum(y.square().sum() for y in ys)

    torch.manual_seed(2)
    direct = torch.autograd.grad(forward(x), inputs)
    torch.manual_seed(2)
    y = checkpoint(forward, x, use_reentrant=False)
    torch.rand(100)  # the generator moves on before the recomputation
    for got, want in zip(torch.autograd.grad(y, inputs), direct, strict=True):
        assert torch.equal(got, want)


@with_triton
def test_same_seed_same_bits():
    shapes = [(20, 4, LORA, True), (8, 2, DORA, False)]
    x, projections = problem((9,), 24, shapes, torch.bfloat16, torch.float32)
    first, second = (run(stacked_linear, x, projections) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
def test_gradcheck_fp64(dropout_p):
    shapes = [(4, 2, LORA, True), (3, 1, DORA, True), (3, 2, DORA, False), (2, 0, BASE, True)]
    x, projections = problem((2, 3), 5, shapes, torch.float64)
    # DoRA's c is detached, as in the paper's section 4.3: with the norm given, numbers see it so too.
    projections = [with_norm(p) for p in leaves(projections)]
    inputs = [x.requires_grad_(), *trained(projections)]

    def function(*_):
        torch.manual_seed(0)
        return stacked_linear(x, projections, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(function, inputs)


def test_fp64_gradients_are_plain_autograds():
    shapes = [(4, 2, LORA, True), (3, 1, DORA, True), (3, 2, DORA, False), (2, 0, BASE, True)]
    x, projections = problem((2, 3), 5, shapes, torch.float64)
    want = run(stacked_linear_reference, x, projections)
    torch.testing.assert_close(run(stacked_linear, x, projections), want, rtol=1e-12, atol=1e-12)


@with_triton
@pytest.mark.parametrize("seeded", [False, True], ids=["plain", "dropout"])
def test_opcheck(seeded, backend):
    x, projections = problem(
        (2, 3), 16, [(12, 2, LORA, True), (8, 3, DORA, True), (8, 1, DORA, False)], torch.float32
    )
    projections = leaves(projections)
    # One norm given, the other left to the op.
    projections[1] = with_norm(projections[1])
    seeds = torch.tensor([3, 4, 5], device=DEVICE if backend == "triton" else "cpu") if seeded else None
    ps = [0.3, 0.3, 0.3] if seeded else [0.0] * 3
    arguments = (x.requires_grad_(), *packed.pack(projections), ps, None, seeds, backend)
    torch.library.opcheck(torch.ops.fastpeft.stacked_linear.default, arguments)


@with_triton
@pytest.mark.parametrize("kind", [LORA, DORA, BASE])
def test_compiles_without_graph_breaks(kind):
    x, projections = problem((4,), 16, [(12, 2, kind, True), (8, 3, kind, False)], torch.float32)
    compiled = torch.compile(stacked_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x, projections), run(stacked_linear, x, projections))


def test_one_graph_serves_every_length():
    _, projections = problem((4,), 16, [(12, 2, LORA, True), (8, 3, DORA, False)], torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(stacked_linear, backend=count, dynamic=True, fullgraph=True)
    for length in (5, 7, 11, 13):  # none of them a size of the projections: dynamo would tie them
        x = torch.randn(2, length, 16).to(DEVICE)
        torch.testing.assert_close(compiled(x, projections), stacked_linear(x, projections))
    assert len(graphs) == 1


def test_autocast_computes_in_its_dtype_compiled_or_not():
    x, projections = problem((5,), 32, [(24, 4, LORA, True), (8, 2, DORA, False)], torch.float32)
    compiled = torch.compile(stacked_linear, backend="aot_eager", fullgraph=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = run(stacked_linear, x, projections)
        traced = run(compiled, x, projections)
    assert {t.dtype for t in inside[:2]} == {torch.bfloat16}
    assert {t.dtype for t in inside[2:]} == {torch.float32}
    for a, b in zip(inside, traced, strict=True):
        assert torch.equal(a, b)
    for y, exact in zip(inside, run(stacked_linear, x, projections), strict=True):
        torch.testing.assert_close(y.float(), exact, rtol=3e-2, atol=1e-1)


def test_norms_are_the_weights_own_under_autocast():
    x, (p,) = problem((5,), 32, [(24, 4, DORA, False)], torch.float32)
    p = replace(p, lora_B=torch.zeros_like(p.lora_B))
    norm = with_norm(p).norm
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        (y,) = stacked_linear(x, [replace(p, magnitude=norm)])
        assert torch.equal(y, F.linear(x, p.weight))  # c is exactly 1


@with_triton
def test_no_gradient_wanted_none_kept():
    x, projections = problem((4,), 16, [(12, 2, LORA, True), (8, 3, DORA, True)], torch.float32)
    with torch.no_grad():
        ys = stacked_linear(x, leaves(projections))
    assert not any(y.requires_grad for y in ys)
    torch.testing.assert_close(ys, stacked_linear_reference(x, projections))


def test_a_trainable_base_weight_gets_its_gradient():
    x, projections = problem((4,), 16, [(12, 2, LORA, True), (8, 3, DORA, False)], torch.float32)
    for p in projections:
        p.weight.requires_grad_()
    weights = [p.weight for p in projections]
    got = torch.autograd.grad([y.square().sum() for y in stacked_linear(x, projections)], weights)
    want = torch.autograd.grad([y.square().sum() for y in stacked_linear_reference(x, projections)], weights)
    torch.testing.assert_close(got, want)


@with_triton
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_zero_and_zero_rows(dtype, bias):
    n = 60
    shapes = [(n, 4, DORA, bias), (80, 2, DORA, bias)]
    x, projections = problem((40,), 16, shapes, dtype, torch.float32)
    magnitude = projections[0].magnitude.clone()
    magnitude[2] *= 3  # c is far from 1 with and without the guard: one way of scaling for both
    projections[0] = replace(projections[0], magnitude=magnitude.clone())
    clean = run(stacked_linear, x, projections)
    magnitude[3], magnitude[4] = 0.0, 1e-35
    changed = [replace(projections[0], magnitude=magnitude), projections[1]]
    check(x, changed)
    got = run(stacked_linear, x, changed)
    others = [i for i in range(n) if i not in (3, 4)]
    assert torch.equal(got[0][:, others], clean[0][:, others])  # the guard moves no other row's bits
    at = 3 + blocks.names(projections).index("magnitude of 0")
    assert torch.equal(got[at][others], clean[at][others])
    weight, lora_B = projections[0].weight.clone(), projections[0].lora_B.clone()
    weight[5], lora_B[5] = 0.0, 0.0
    changed[0] = replace(changed[0], weight=weight, lora_B=lora_B)
    zero = run(stacked_linear, x, changed)
    for result in zero:
        assert torch.isfinite(result).all()
    others = [i for i in range(n) if i not in (3, 4, 5)]
    assert torch.equal(zero[0][:, others], clean[0][:, others])
    assert torch.equal(zero[at][others], clean[at][others])
    assert torch.equal(zero[1], clean[1])  # and nothing of the other projection
    assert torch.equal(zero[-1], clean[-1])


def test_the_output_of_lora_may_be_changed_in_place():
    x, projections = problem((2, 3), 16, [(12, 2, LORA, True), (8, 3, LORA, False)], torch.float32)
    projections = leaves(projections)
    lora_A = projections[0].lora_A
    got = torch.autograd.grad(F.relu_(stacked_linear(x, projections)[0]).sum(), lora_A)
    want = torch.autograd.grad(F.relu(stacked_linear_reference(x, projections)[0]).sum(), lora_A)
    torch.testing.assert_close(got, want)


def test_meta_tensors_give_shapes():
    x, projections = problem((2, 3), 16, [(12, 2, LORA, True), (8, 3, DORA, False)], torch.float32)
    on_meta = [
        replace(p, **{f: None if (t := getattr(p, f)) is None else t.to("meta") for f in packed.FIELDS})
        for p in projections
    ]
    ys = stacked_linear(x.to("meta"), on_meta)
    assert [y.shape for y in ys] == [(2, 3, 12), (2, 3, 8)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"lora_A": torch.zeros(3, 15, device=DEVICE)},
            r"projection 1: expected lora_A \[r, 16\].*got lora_A \[3, 15\]",
        ),
        ({"lora_B": torch.zeros(8, 2, device=DEVICE)}, r"projection 1: .*lora_B \[8, 2\]"),
        ({"lora_B": None}, r"projection 1: expected both lora_A and lora_B or neither"),
        (
            {"weight": torch.zeros(8, 15, device=DEVICE)},
            r"projection 1: .*got x \[4, 16\] and weight \[8, 15\]",
        ),
        ({"bias": torch.zeros(7, device=DEVICE)}, r"projection 1: expected bias \[8\], got \[7\]"),
        ({"magnitude": torch.zeros(7, device=DEVICE)}, r"projection 1: expected magnitude \[8\], got \[7\]"),
        ({"norm": torch.zeros(7, device=DEVICE)}, r"projection 1: expected norm \[8\], got \[7\]"),
        ({"lora_A": None, "lora_B": None}, r"projection 1: expected lora_A and lora_B beside a magnitude"),
        (
            {"weight": torch.zeros(8, 16, device=DEVICE).bfloat16()},
            r"projection 1: .*torch.bfloat16, got torch.float32",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, said):
    x, projections = problem((4,), 16, [(12, 2, LORA, True), (8, 3, DORA, False)], torch.float32)
    projections[1] = replace(projections[1], **changes)
    with pytest.raises(fastpeft.ShapeError, match=said):
        stacked_linear(x, projections)


def test_no_projection_is_an_error():
    with pytest.raises(fastpeft.ShapeError, match="at least one projection, got none"):
        stacked_linear(torch.zeros(2, 3), [])


@pytest.mark.parametrize("kind", [LORA, DORA])
def test_torch_func_sees_through(kind):
    x, projections = problem((5,), 16, [(12, 2, kind, True), (8, 3, LORA, False)], torch.float32)

    def loss(x: Tensor, lora_A: Tensor) -> Tensor:
        ys = stacked_linear(x, [replace(projections[0], lora_A=lora_A), projections[1]])
        return sum(y.square().sum() for y in ys)

    leaves = [x.clone().requires_grad_(), projections[0].lora_A.clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=(0, 1))(x, projections[0].lora_A)
    torch.testing.assert_close(got, expected)
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))
    torch.testing.assert_close(per_sample(x[:, None], projections[0].lora_A).sum(0), expected[1])
