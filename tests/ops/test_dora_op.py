"""The DoRA op: formula, dropout, gradients, the factored norm, zero rows, no [N, K] temporary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpeft
from bench.saved import count
from fastpeft.ops import native
from fastpeft.ops import row_norm as row_norms
from fastpeft.ops.dora import dora_linear, dora_linear_reference
from fastpeft.ops.dropout import draw_seeds, dropout_mask
from fastpeft.ops.features import scale_features
from fastpeft.ops.products import RowScale
from fastpeft.ops.row_norm import row_norm, row_norm_squared
from fastpeft.ops.ways import way_for
from tests.device import DEVICE
from tests.kernels import interpreter
from tests.tolerance import assert_within_rule, relative_error

SCALING = 0.7
SHAPES = [
    pytest.param((8,), 16, 32, 4, id="aligned"),
    pytest.param((3, 5), 23, 37, 5, id="ragged-3d"),
    pytest.param((200, 3), 23, 37, 5, id="many-tokens"),
    pytest.param((120,), 40, 48, 1, id="rank1"),
    pytest.param((37,), 24, 20, 40, id="rank-above-features"),
    pytest.param((0,), 12, 10, 3, id="zero-tokens"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDER = ("x", "weight", "bias", "lora_A", "lora_B", "magnitude")


@pytest.fixture(params=["torch-native", "torch-fp32", "torch-few", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, force_products) -> Iterator[str]:
    name, _, way = request.param.partition("-")
    force_products(way)
    with interpreter.mended(), fastpeft.use_backend(name):
        yield name


def problem(batch, k, n, r, dtype, *, adapter=None, bias=True) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(k * 31 + n * 7 + r)
    weight = (torch.randn(n, k, generator=g) / k**0.5).to(DEVICE, dtype)
    tensors = {
        "x": torch.randn(*batch, k, generator=g).to(DEVICE, dtype),
        "weight": weight,
        "bias": torch.randn(n, generator=g).to(DEVICE, dtype) if bias else None,
        "lora_A": (torch.randn(r, k, generator=g) / k**0.5).to(DEVICE, adapter or dtype),
        "lora_B": (0.3 * torch.randn(n, r, generator=g) / r**0.5).to(DEVICE, adapter or dtype),
    }
    factors = (0.5 + torch.rand(n, generator=g)).to(DEVICE)
    tensors["magnitude"] = (weight.float().norm(dim=1) * factors).to(adapter or dtype)
    return tensors


def leaves(tensors, dtype=None) -> list[Tensor | None]:
    def leaf(name: str) -> Tensor | None:
        t = tensors[name]
        return (
            None
            if t is None
            else (t if dtype is None else t.to(dtype)).detach().requires_grad_(name != "weight")
        )

    return [leaf(name) for name in ORDER]


def ours(*arguments, **options):
    return dora_linear(*arguments, scaling=SCALING, **options)


def run(function, arguments, dtype, **options) -> list[Tensor]:
    y = function(*arguments, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype).to(y.dtype)
    trained = [a for a in arguments if a is not None and a.requires_grad]
    return [y, *torch.autograd.grad(y, trained, dy)]


def check(tensors, mask=None, **options) -> None:
    dtype = tensors["x"].dtype
    names = ["y", "dx", *(["dbias"] if tensors["bias"] is not None else []), "dA", "dB", "dm"]
    results = run(ours, leaves(tensors), dtype, **options)

    def baseline(in_dtype):
        kwargs = {} if mask is None else {"mask": mask.to(in_dtype)}
        kwargs |= {name: value for name, value in options.items() if name == "dropout_on_base"}
        return run(dora_linear_reference, leaves(tensors, in_dtype), dtype, scaling=SCALING, **kwargs)

    for name, result, exact, plain in zip(
        names, results, baseline(torch.float64), baseline(dtype), strict=True
    ):
        assert_within_rule(result, exact, plain, name)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "k", "n", "r"), SHAPES)
def test_two_times_rule(batch, k, n, r, dtype, bias):
    check(problem(batch, k, n, r, dtype, bias=bias))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_adapters_on_a_16_bit_base(dtype, bias):
    tensors = problem((3, 50), 23, 37, 5, dtype, adapter=torch.float32, bias=bias)
    check(tensors)
    y, *_, dm = run(ours, leaves(tensors), dtype)
    assert (y.dtype, dm.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("on_base", [True, False], ids=["pefts-meaning", "adapter-only"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_meanings_of_dropout(backend, dtype, bias, on_base):
    if backend == "triton":
        pytest.skip("the kernels' own mask is checked against its formula in tests/kernels")
    tensors = problem((4, 25), 16, 12, 4, dtype, bias=bias)
    torch.manual_seed(3)
    seed = draw_seeds(tensors["x"], [0.3], "torch")
    mask = dropout_mask(tensors["x"].reshape(-1, 16), 0.3, seed).view(4, 25, 16)
    assert 0.5 < (mask > 0).float().mean() < 0.9
    torch.manual_seed(3)
    check(tensors, mask=mask, dropout_p=0.3, dropout_on_base=on_base)


def test_a_large_bias_does_not_spoil_the_magnitudes_gradient():
    tensors = problem((300,), 16, 12, 4, torch.bfloat16)
    tensors["bias"] = tensors["bias"] * 200
    check(tensors)


@pytest.mark.parametrize("trained", ["x", "bias", "lora_A", "lora_B", "magnitude"])
def test_only_the_gradient_asked_for(trained):
    tensors = problem((3, 4), 10, 12, 3, torch.float32)
    tensors[trained].requires_grad_()
    arguments = [tensors[name] for name in ORDER]
    ours(*arguments).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [trained]
    (expected,) = torch.autograd.grad(dora_linear_reference(*arguments, SCALING).sum(), tensors[trained])
    torch.testing.assert_close(tensors[trained].grad, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout_p": 0.3}, {"dropout_p": 0.3, "dropout_on_base": False}],
    ids=["plain", "dropout", "adapter-dropout"],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck_fp64_against_numbers(backend, bias, options):
    if backend == "triton":
        pytest.skip("the kernels take no fp64")
    # c is detached, as in the paper's section 4.3, so numbers can check only what does not move the norm.
    t = problem((2, 3), 5, 4, 2, torch.float64, bias=bias)
    x, m = t["x"].requires_grad_(), t["magnitude"].requires_grad_()

    def function(x, m):
        torch.manual_seed(0)
        return ours(x, t["weight"], t["bias"], t["lora_A"], t["lora_B"], m, **options)

    assert torch.autograd.gradcheck(function, (x, m))


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout_p": 0.3}, {"dropout_p": 0.3, "dropout_on_base": False}],
    ids=["plain", "dropout", "adapter-dropout"],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_gradcheck_fp64_of_everything_beside_a_given_norm(backend, bias, options):
    """The norm given is a constant to numbers as it is to the op: A and B can be checked as well."""
    if backend == "triton":
        pytest.skip("the kernels take no fp64")
    t = problem((2, 3), 5, 4, 2, torch.float64, bias=bias)
    norm = row_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING, row_norm_squared(t["weight"]))
    trained = [name for name in ORDER if name != "weight" and t[name] is not None]

    def function(*given):
        torch.manual_seed(0)
        tensors = t | dict(zip(trained, given, strict=True))
        return ours(*(tensors[name] for name in ORDER), norm=norm, **options)

    assert torch.autograd.gradcheck(function, [t[name].requires_grad_() for name in trained])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_magnitude_zero_in_16_bits(dtype, bias):
    """fp16 cannot hold 2^-100 z in y, and keeps z; bf16 can, and reads it back from y."""
    tensors = problem((60,), 24, 60, 4, dtype, adapter=torch.float32, bias=bias)
    magnitude = tensors["magnitude"].clone()
    magnitude[2] *= 3  # c is far from 1 with and without the guard: one way of scaling for both
    tensors["magnitude"] = magnitude.clone()
    clean = run(ours, leaves(tensors), dtype)
    magnitude[3], magnitude[4] = 0.0, -1e-35
    tensors["magnitude"] = magnitude
    check(tensors)
    got = run(ours, leaves(tensors), dtype)
    others = [i for i in range(60) if i not in (3, 4)]
    assert torch.equal(got[0][:, others], clean[0][:, others])
    assert torch.equal(got[-1][others], clean[-1][others])
    assert got[-1][3].abs() > 0
    assert got[-1][4].abs() > 0


def test_magnitude_zero_and_zero_rows():
    tensors = problem((6,), 16, 12, 4, torch.float32, bias=False)
    clean = run(ours, leaves(tensors), torch.float32)
    tensors["magnitude"] = tensors["magnitude"].clone()
    tensors["magnitude"][3] = 0.0
    got = run(ours, leaves(tensors), torch.float32)
    want = run(dora_linear_reference, leaves(tensors), torch.float32, scaling=SCALING)
    torch.testing.assert_close(got, want)
    others = [i for i in range(12) if i != 3]
    assert torch.equal(got[0][:, others], clean[0][:, others])  # the guard moves no other row's bits
    assert torch.equal(got[-1][others], clean[-1][others])
    tensors["weight"] = tensors["weight"].clone()
    tensors["weight"][5] = 0.0
    tensors["lora_B"] = tensors["lora_B"].clone()
    tensors["lora_B"][5] = 0.0
    zero = run(ours, leaves(tensors), torch.float32)
    for result in zero:
        assert torch.isfinite(result).all()
    others = [i for i in range(12) if i not in (3, 5)]
    assert torch.equal(zero[0][:, others], clean[0][:, others])
    assert torch.equal(zero[-1][others], clean[-1][others])
    assert not zero[0][:, 5].any()
    assert zero[-1][5] == 0


def test_factored_norm_is_the_norm():
    t = problem((1,), 40, 30, 6, torch.float64)
    squared = row_norm_squared(t["weight"])
    factored = row_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING, squared)
    direct = (t["weight"] + SCALING * t["lora_B"] @ t["lora_A"]).norm(dim=1)
    torch.testing.assert_close(factored, direct)
    # An update that cancels the row leaves rounding below zero under the root: clamped, not NaN.
    W = torch.randn(3, 4).to(DEVICE)
    assert torch.isfinite(row_norm(W, torch.eye(4, device=DEVICE), -W, 1.0, row_norm_squared(W))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.skipif(DEVICE.type != "cpu", reason="a way for CPUs alone")
def test_the_norm_by_fp32_blocks(dtype, force_products):
    t = problem((1,), 40, 70, row_norms.MIN_RANK, dtype)
    names = ("weight", "lora_A", "lora_B")
    W, A, B = (t[name].detach() for name in names)
    exact = (W.double() + SCALING * B.double() @ A.double()).norm(dim=1)
    found = {}
    for way in ("native", "fp32"):
        force_products(way)
        found[way] = row_norm(W, A, B, SCALING, row_norm_squared(W))
    assert_within_rule(found["fp32"], exact, found["native"], "n")
    # W A^T is rounded once less, and the blocks of a few rows are all of W's rows.
    assert not torch.equal(found["fp32"], found["native"])
    fewer = row_norm(W, A[:-1], B[:, :-1], SCALING, row_norm_squared(W))
    force_products("native")
    assert torch.equal(fewer, row_norm(W, A[:-1], B[:, :-1], SCALING, row_norm_squared(W)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("tokens", [40, 200])
def test_the_same_bits_whether_anyone_differentiates(tokens, bias, dtype):
    """As reentrant checkpointing needs, whose loss is that of a call without gradients."""
    arguments = leaves(problem((tokens,), 48, 56, 4, dtype, bias=bias))
    with torch.no_grad():
        unrecorded = ours(*arguments)
    assert torch.equal(ours(*arguments), unrecorded)


class Allocations(TorchDispatchMode):
    """Records the shapes of all tensors that operations make, views of the given ones left out."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.shapes |= {tuple(t.shape) for t in made if t.untyped_storage().data_ptr() not in self.given}
        return result


@pytest.mark.parametrize("tokens", [64, 100])
def test_no_out_by_in_temporary(tokens):
    """But c W, in W's dtype, where c scales that instead of the tensors that are larger."""
    tensors = problem((tokens,), 48, 56, 4, torch.bfloat16, adapter=torch.float32, bias=False)
    arguments = leaves(tensors)
    spy = Allocations(arguments[1])
    import fastpeft.ops.dora as dora

    with spy, torch.no_grad():  # the bodies of the custom ops, which the dispatcher hides from a mode outside
        y, S, _, norm = dora._forward(*arguments, None, SCALING, 0.0, None, False, "torch")
        dora._gradients(
            torch.ones_like(y), arguments[0], y, *(arguments[i] for i in (1, 3, 4, 5)), S, norm, SCALING, 0.0,
            None, False, False, "torch", [True, False, True, True, True], None,
        )  # fmt: skip
    assert (tokens, 56) in spy.shapes, "the spy saw no output: it is not looking inside the op"
    x = arguments[0]
    of_the_weight = spy.shapes & {(56, 48), (48, 56)}
    assert bool(of_the_weight) == (tokens == 100 and x.is_cpu and way_for(x) is native)


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout_p": 0.3}, {"dropout_p": 0.3, "dropout_on_base": False}],
    ids=["plain", "dropout", "adapter-dropout"],
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_one_output_s_the_norm_and_the_seed_are_saved(backend, bias, options):
    """To the byte, beyond x and the parameters: y itself, or z in its place; no copy of x, no mask."""
    tokens, n, r = 64, 56, 4
    tensors = problem((tokens,), 48, n, r, torch.bfloat16, adapter=torch.float32, bias=bias)
    arguments = leaves(tensors)
    given = [t for t in arguments if t is not None]
    found = count(lambda: ours(*arguments, **options).sum(), given)
    expected = 2 * tokens * (n + r) + 4 * n + 8 * bool(options)
    assert found[0] == expected
    if backend == "torch":  # the interpreter holds memory of its own
        assert found[1] == expected
    norm = torch.ones(n, device=DEVICE)  # kept by the caller: the output, S and the seed
    found = count(lambda: ours(*arguments, norm=norm, **options).sum(), [*given, norm])
    assert found[0] == expected - 4 * n
    arguments[-1].requires_grad_(False)  # a frozen magnitude: no output
    found = count(lambda: ours(*arguments, norm=norm, **options).sum(), [*given, norm])
    assert found[0] == 2 * tokens * r + 8 * bool(options)


def test_scale_features_keeps_fp32_resolution_near_one_and_far_from_it():
    y = torch.randn(300, 40).to(DEVICE, torch.bfloat16)
    for spread in (1e-3, 0.4, 5.0):
        c = 1 + spread * (2 * torch.rand(40).to(DEVICE) - 1)
        exact = y.double() * c.double()
        ours_error = relative_error(scale_features(y, RowScale(c)), exact)
        rounding = relative_error(exact.bfloat16(), exact)  # the least any bf16 result can be off
        assert ours_error <= 1.5 * rounding, f"spread {spread}: {ours_error:.2e} against {rounding:.2e}"


def test_scale_features_far_from_one_leaves_the_other_features_bits():
    y, c = torch.randn(300, 40).to(DEVICE, torch.bfloat16), 1 + 0.1 * torch.rand(40).to(DEVICE)
    near = scale_features(y, RowScale(c))
    c[[3, 17]] = torch.tensor([0.0, -7.0], device=DEVICE)
    for out in (None, y.clone()):
        mixed = scale_features(y if out is None else out, RowScale(c), out=out)
        others = [i for i in range(40) if i not in (3, 17)]
        assert torch.equal(mixed[:, others], near[:, others])
        assert torch.equal(mixed[:, [3, 17]], (y[:, [3, 17]].float() * c[[3, 17]]).bfloat16())


def test_opcheck_and_compile(backend):
    for bias in (True, False):
        arguments = leaves(problem((2, 3), 16, 16, 2, torch.float32, bias=bias))
        t = dict(zip(ORDER, (a if a is None else a.detach() for a in arguments), strict=True))
        norm = row_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING, row_norm_squared(t["weight"]))
        for given in (None, norm):
            torch.library.opcheck(
                torch.ops.fastpeft.dora_linear.default,
                (*arguments, given, SCALING, [0.0], None, None, False, backend),
            )
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), ours(*arguments))


def test_norm_stays_fp32_under_autocast():
    tensors = problem((5,), 32, 24, 4, torch.float32, bias=False)
    t = {k: v for k, v in tensors.items() if v is not None}
    outside = row_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING, row_norm_squared(t["weight"]))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = row_norm(t["weight"], t["lora_A"], t["lora_B"], SCALING, row_norm_squared(t["weight"]))
        y = ours(*leaves(tensors))
    assert torch.equal(inside, outside)
    assert y.dtype is torch.bfloat16


def test_wrong_magnitude_shape_is_named():
    arguments = leaves(problem((2,), 16, 12, 2, torch.float32))
    with pytest.raises(fastpeft.ShapeError, match=r"expected magnitude \[12\], got \[11\]"):
        ours(*arguments[:5], torch.ones(11, device=DEVICE))


def test_autocast_is_the_same_compiled_and_eager():
    arguments = leaves(problem((5,), 32, 24, 4, torch.float32, bias=False))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(compiled(*arguments), ours(*arguments))
