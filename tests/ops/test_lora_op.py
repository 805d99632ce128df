"""The LoRA op on both backends: formula, gradients, dtypes, shapes, compile, checkpointing, autocast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastpeft
from bench.saved import count
from fastpeft.ops.dropout import draw_seeds, dropout_mask
from fastpeft.ops.lora import lora_linear, lora_linear_reference
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.tolerance import assert_within_rule

SCALING = 0.7
# batch dimensions, in_features, out_features, rank
SHAPES = [
    pytest.param((8,), 16, 32, 4, id="aligned"),
    pytest.param((3, 5), 23, 37, 5, id="ragged-3d"),
    pytest.param((2, 2, 3), 89, 71, 1, id="rank1-4d"),
    pytest.param((37,), 24, 20, 40, id="rank-above-features"),
    pytest.param((0,), 12, 10, 3, id="zero-tokens"),
    pytest.param((2, 0), 12, 10, 3, id="zero-tokens-3d"),
]


@pytest.fixture(params=["torch-native", "torch-fp32", "torch-few", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, force_products) -> Iterator[str]:
    name, _, way = request.param.partition("-")
    force_products(way)
    with interpreter.mended(), fastpeft.use_backend(name):
        yield name


def problem(
    batch: tuple[int, ...],
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    *,
    adapter: torch.dtype | None = None,
    bias: bool = True,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(k * 31 + n * 7 + r)
    tensors = {
        "x": torch.randn(*batch, k, generator=g).to(DEVICE, dtype),
        "weight": (torch.randn(n, k, generator=g) / k**0.5).to(DEVICE, dtype),
        "lora_A": (torch.randn(r, k, generator=g) / k**0.5).to(DEVICE, adapter or dtype),
        "lora_B": (torch.randn(n, r, generator=g) / r**0.5).to(DEVICE, adapter or dtype),
    }
    if bias:
        tensors["bias"] = torch.randn(n, generator=g).to(DEVICE, dtype)
    return tensors


def run(tensors: dict[str, Tensor], function, dtype: torch.dtype | None = None, mask: Tensor | None = None):
    """Return y and the gradients of x, lora_A, lora_B and bias for one fixed dY."""
    cast = {k: (t if dtype is None else t.to(dtype)).detach().clone() for k, t in tensors.items()}
    trained = [cast[name].requires_grad_() for name in ("x", "lora_A", "lora_B", "bias") if name in cast]
    arguments = [cast["x"], cast["weight"], cast.get("bias"), cast["lora_A"], cast["lora_B"]]
    y = function(*arguments) if mask is None else function(*arguments, mask.to(y_dtype(cast)))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    dy = dy.to(DEVICE, tensors["x"].dtype).to(y.dtype)
    return [y, *torch.autograd.grad(y, trained, dy)]


def y_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return tensors["x"].dtype


def reference(x, weight, bias, lora_A, lora_B, mask=None):
    return lora_linear_reference(x, weight, bias, lora_A, lora_B, SCALING, mask)


def ours(x, weight, bias, lora_A, lora_B):
    return lora_linear(x, weight, bias, lora_A, lora_B, scaling=SCALING)


def check(tensors: dict[str, Tensor], names=("y", "dx", "dA", "dB", "dbias")) -> None:
    results = run(tensors, ours)
    exact = run(tensors, reference, torch.float64)
    plain = run(tensors, reference, tensors["x"].dtype)
    for name, result, expected, baseline in zip(names, results, exact, plain, strict=False):
        assert_within_rule(result, expected, baseline, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "k", "n", "r"), SHAPES)
def test_two_times_rule(batch, k, n, r, dtype):
    check(problem(batch, k, n, r, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_on_a_16_bit_base(dtype):
    tensors = problem((3, 5), 23, 37, 5, dtype, adapter=torch.float32)
    check(tensors)
    y, _, dA, dB, _ = run(tensors, ours)
    assert (y.dtype, dA.dtype, dB.dtype) == (dtype, torch.float32, torch.float32)


def test_no_bias():
    check(problem((7,), 16, 24, 4, torch.float32, bias=False))


@pytest.mark.parametrize("layout", ["transposed-tokens", "strided-features", "conv1d-weight"])
def test_strided_inputs(layout):
    tensors = problem((4, 6), 16, 24, 4, torch.float32)
    strided = dict(tensors)
    if layout == "transposed-tokens":
        strided["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided-features":
        strided["x"] = torch.repeat_interleave(tensors["x"], 2, dim=-1)[..., ::2]
    else:
        strided["weight"] = tensors["weight"].t().contiguous().t()
    assert not all(t.is_contiguous() for t in strided.values())
    args = [strided["x"], strided["weight"], strided["bias"], strided["lora_A"], strided["lora_B"]]
    plain = [tensors["x"], tensors["weight"], tensors["bias"], tensors["lora_A"], tensors["lora_B"]]
    for a, p in zip(args, plain, strict=True):
        assert torch.equal(a, p)
        a.requires_grad_(a is not strided["weight"])
        p.requires_grad_(p is not tensors["weight"])
    dy = torch.randn(6, 4, 24).to(DEVICE).transpose(0, 1)  # a gradient whose rows are not in order either
    wanted = [0, 2, 3, 4]
    got = torch.autograd.grad(ours(*args), [args[i] for i in wanted], dy)
    expected = torch.autograd.grad(reference(*plain), [plain[i] for i in wanted], dy)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("trained", ["x", "lora_A", "lora_B", "bias"])
def test_only_the_gradient_asked_for(trained):
    tensors = problem((3, 4), 10, 12, 3, torch.float32)
    tensors[trained].requires_grad_()
    arguments = [tensors[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    ours(*arguments).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [trained]
    (expected,) = torch.autograd.grad(reference(*arguments).sum(), tensors[trained])
    torch.testing.assert_close(tensors[trained].grad, expected)


def test_a_frozen_lora_a_saves_no_input():
    tensors = problem((64,), 32, 16, 2, torch.float32)
    for name, expected in (("lora_A", True), ("lora_B", False)):
        saved: list[int] = []
        leaf = tensors[name].detach().clone().requires_grad_()
        arguments = {**tensors, name: leaf}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.untyped_storage().data_ptr()) or t, lambda t: t
        ):
            ours(*(arguments[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")))
        assert (tensors["x"].untyped_storage().data_ptr() in saved) is expected


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_s_and_the_seed_are_saved(backend, bias, dropout_p):
    """To the byte, beyond x and the parameters: no copy of x, no mask, no output."""
    tensors = problem((64,), 48, 56, 4, torch.bfloat16, adapter=torch.float32, bias=bias)
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    arguments = [tensors.get(n) for n in names]
    given = [t.requires_grad_(n != "weight") for n, t in tensors.items()]
    found = count(lambda: lora_linear(*arguments, scaling=SCALING, dropout_p=dropout_p).sum(), given)
    expected = 2 * 64 * 4 + 8 * (dropout_p > 0)
    assert found[0] == expected
    if backend == "torch":  # the interpreter holds memory of its own
        assert found[1] == expected


def test_dropout_is_drawn_again_in_backward(backend):
    tensors = problem((6, 7), 16, 12, 4, torch.float32)
    leaves = [tensors[n].requires_grad_() for n in ("x", "lora_A", "lora_B")]

    def forward() -> Tensor:
        return lora_linear(
            tensors["x"], tensors["weight"], None, leaves[1], leaves[2], scaling=SCALING, dropout_p=0.4
        )

    torch.manual_seed(1)
    y = forward()
    if backend == "torch":  # the kernel's own mask is checked against its formula in tests/kernels
        torch.manual_seed(1)
        seed = draw_seeds(tensors["x"], [0.4], "torch")
        mask = dropout_mask(tensors["x"].reshape(-1, 16), 0.4, seed).view(6, 7, 16)
        expected = reference(tensors["x"], tensors["weight"], None, leaves[1], leaves[2], mask)
        torch.testing.assert_close(y, expected)
        for got, want in zip(
            torch.autograd.grad(y.square().sum(), leaves, retain_graph=True),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
    # y is linear in lora_B for a fixed mask: a mask that changed in backward would break this identity.
    (dB,) = torch.autograd.grad(y.sum(), leaves[2])
    base = F.linear(tensors["x"], tensors["weight"])
    torch.testing.assert_close((dB * leaves[2]).sum(), (y - base).sum(), rtol=1e-4, atol=1e-4)


def test_dropout_survives_activation_checkpointing():
    tensors = problem((6,), 16, 12, 4, torch.float32)
    leaves = [tensors[n].requires_grad_() for n in ("x", "lora_A", "lora_B")]

    def forward(x, a, b):
        return lora_linear(x, tensors["weight"], None, a, b, scaling=SCALING, dropout_p=0.5).square()

    torch.manual_seed(2)
    direct = torch.autograd.grad(forward(*leaves).sum(), leaves)
    torch.manual_seed(2)
    y = checkpoint(forward, *leaves, use_reentrant=False)
    torch.rand(100)  # the generator moves on before the recomputation
    for got, want in zip(torch.autograd.grad(y.sum(), leaves), direct, strict=True):
        assert torch.equal(got, want)


def test_same_seed_same_bits():
    tensors = problem((9,), 24, 20, 4, torch.bfloat16, adapter=torch.float32)
    for first, second in zip(run(tensors, ours), run(tensors, ours), strict=True):
        assert torch.equal(first, second)


def test_gradcheck_fp64(backend):
    if backend == "triton":
        pytest.skip("the kernels take no fp64")
    t = {k: v.requires_grad_(k != "weight") for k, v in problem((2, 3), 5, 4, 2, torch.float64).items()}
    inputs = (t["x"], t["bias"], t["lora_A"], t["lora_B"])
    assert torch.autograd.gradcheck(lambda x, b, A, B: ours(x, t["weight"], b, A, B), inputs)

    def dropped(x, b, A, B):
        torch.manual_seed(0)
        return lora_linear(x, t["weight"], b, A, B, scaling=SCALING, dropout_p=0.3)

    assert torch.autograd.gradcheck(dropped, inputs)


def test_opcheck(backend):
    t = {k: v.requires_grad_(k != "weight") for k, v in problem((2, 3), 16, 16, 2, torch.float32).items()}
    arguments = (
        t["x"],
        t["weight"],
        t["bias"],
        t["lora_A"],
        t["lora_B"],
        SCALING,
        [0.0],
        None,
        None,
        backend,
    )
    torch.library.opcheck(torch.ops.fastpeft.lora_linear.default, arguments)


def test_compiles_without_graph_breaks():
    tensors = problem((4,), 16, 12, 2, torch.float32)
    arguments = [
        tensors[n].requires_grad_(n != "weight") for n in ("x", "weight", "bias", "lora_A", "lora_B")
    ]
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), ours(*arguments))
    (got,) = torch.autograd.grad(compiled(*arguments).square().sum(), arguments[3])
    (want,) = torch.autograd.grad(ours(*arguments).square().sum(), arguments[3])
    torch.testing.assert_close(got, want)


def test_autocast_computes_in_its_dtype(backend):
    tensors = problem((4,), 16, 12, 2, torch.float32)
    arguments = [
        tensors[n].requires_grad_(n != "weight") for n in ("x", "weight", "bias", "lora_A", "lora_B")
    ]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = ours(*arguments)
        gradients = torch.autograd.grad(y.sum(), [arguments[0], arguments[3]])
    assert y.dtype is torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]
    exact = ours(*arguments)
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=5e-2)


def test_a_trainable_base_weight_gets_its_gradient():
    tensors = {k: v.requires_grad_() for k, v in problem((4,), 16, 12, 2, torch.float32).items()}
    arguments = [tensors[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")]
    got = torch.autograd.grad(ours(*arguments).square().sum(), arguments)
    want = torch.autograd.grad(reference(*arguments).square().sum(), arguments)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("x", (4, 15), "x [4, 15] and weight [12, 16]"),
        ("lora_A", (2, 15), "lora_A [2, 15]"),
        ("lora_B", (12, 3), "lora_B [12, 3]"),
        ("bias", (11,), "expected bias [12], got [11]"),
    ],
)
def test_wrong_shapes_are_named(name, shape, said):
    tensors = {**problem((4,), 16, 12, 2, torch.float32), name: torch.zeros(shape, device=DEVICE)}
    with pytest.raises(fastpeft.ShapeError) as error:
        ours(*(tensors[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")))
    assert said in str(error.value)


def test_wrong_dtype_is_named():
    tensors = problem((4,), 16, 12, 2, torch.float32)
    tensors["x"] = tensors["x"].bfloat16()
    with pytest.raises(fastpeft.ShapeError, match=r"weight's dtype torch.float32, got torch.bfloat16"):
        ours(*(tensors[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")))


def test_the_output_may_be_changed_in_place():
    tensors = problem((2, 3), 16, 12, 2, torch.float32)
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    arguments = [tensors[n].requires_grad_(n != "weight") for n in names]
    got = torch.autograd.grad(F.relu_(ours(*arguments)).sum(), arguments[3])
    want = torch.autograd.grad(F.relu(reference(*arguments)).sum(), arguments[3])
    torch.testing.assert_close(got, want)


def test_one_graph_serves_every_length():
    tensors = problem((4,), 16, 12, 2, torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, backend=count, dynamic=True, fullgraph=True)
    rest = [tensors[n] for n in ("weight", "bias", "lora_A", "lora_B")]
    for length in (3, 5, 7, 11):
        x = torch.randn(2, length, 16).to(DEVICE)
        torch.testing.assert_close(compiled(x, *rest), ours(x, *rest))
    assert len(graphs) == 1


def test_meta_tensors_give_shapes(backend):
    if backend == "triton":
        pytest.skip("an explicit choice of kernels needs tensors that they can reach")
    tensors = {k: v.to("meta") for k, v in problem((2, 3), 16, 12, 2, torch.float32).items()}
    y = ours(*(tensors[n] for n in ("x", "weight", "bias", "lora_A", "lora_B")))
    assert (y.shape, y.device.type) == ((2, 3, 12), "meta")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "torch"), ((8, 0), "triton")])
def test_auto_takes_kernels_only_where_they_run(monkeypatch, capability, expected):
    from fastpeft import backend as backends

    class OnGpu:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)

    backends._has_configuration.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with fastpeft.use_backend("auto"):
        assert backends.resolve(OnGpu(), op="lora_linear") == expected
    with fastpeft.use_backend("triton"):
        if expected == "torch":
            with pytest.raises(fastpeft.BackendError, match=r"need compute capability 8\.0"):
                backends.resolve(OnGpu(), op="lora_linear")
    backends._has_configuration.cache_clear()
