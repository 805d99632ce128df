"""Linears that share an x, in shared launches, against fp64 by the rule of tests/tolerance.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastpeft_kernels import Projection, configs, stacked_backward, stacked_forward
from tests.kernels import memory
from tests.kernels.block_reference import Block, Kind, evaluate_block, make_block, run_block, wants
from tests.kernels.test_numerics import DTYPES, spread
from tests.tolerance import assert_within_rule

# Grouped-query widths, ranks below, on and above the tile, every kind of projection beside every other.
QKV = [Kind(n=70, r=5, bias=True), Kind(n=20, r=16, dora=True), Kind(n=20, r=40)]
# Few tiles of columns and many of tokens, or the other way: the passes over x split their reductions.
NARROW = [Kind(n=20, r=5), Kind(n=33, r=16, dora=True), Kind(n=20, r=7)]
CASES = [
    pytest.param(37, 50, QKV, id="qkv-r5-dora16-r40"),
    pytest.param(33, 64, [Kind(n=33, r=16, dora=True, bias=True), Kind(n=47, bias=True)], id="dora-and-none"),
    pytest.param(20, 40, [Kind(n=20), Kind(n=45, r=1), Kind(n=20, r=7, dora=True)], id="none-r1-dora7"),
    pytest.param(70, 33, [Kind(n=45, r=130)], id="one-r130"),
    pytest.param(1, 35, [Kind(n=20), Kind(n=33)], id="one-token-no-adapters"),
    pytest.param(130, 30, NARROW, id="tokens-split"),
    pytest.param(20, 130, NARROW, id="columns-split"),
]


def check(b: Block, **vendor: bool) -> None:
    found, dtype = run_block(b, **vendor), b.x.dtype
    reference, plain = evaluate_block(b, torch.float64), evaluate_block(b, dtype)
    assert {name for name in reference if name[0] != "z"} <= set(found)
    for name, tensor in found.items():
        assert_within_rule(tensor, reference[name], plain[name], name)
    assert all(found[name].dtype == dtype for name in ("y0", "S", "dx"))
    for i, p in enumerate(b.projections):
        for name, like in {"dA": p.lora_A, "dB": p.lora_B, "dm": p.magnitude, "dbias": p.bias}.items():
            assert (like is None) == (f"{name}{i}" not in found)
            assert like is None or found[f"{name}{i}"].dtype == like.dtype, name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("m", "k", "kinds"), CASES)
def test_ragged(m: int, k: int, kinds: list[Kind], dtype: torch.dtype, device: torch.device) -> None:
    check(make_block(m, k, kinds, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_dropout(dtype: torch.dtype, device: torch.device) -> None:
    """A mask a projection, one in all of forward and backward; dx is wide enough for several column parts."""
    check(make_block(21, 90, QKV, dtype, device, dropout_p=0.3, adapter=torch.float32))


LORA = [Kind(n=70, r=5, bias=True), Kind(n=20), Kind(n=20, r=40)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_vendor_gemm(dtype: torch.dtype, dropout_p: float, device: torch.device) -> None:
    """The vendor's GEMMs and passes over their results: forward of every kind, backward of LoRA."""
    adapter = torch.float32
    check(make_block(21, 90, QKV, dtype, device, dropout_p=dropout_p, adapter=adapter), vendor_forward=True)
    lora = make_block(21, 90, LORA, dtype, device, dropout_p=dropout_p, adapter=adapter)
    check(lora, vendor_forward=True, vendor_backward=True)
    lora.dys[0] = None
    reference, plain = evaluate_block(lora, torch.float64), evaluate_block(lora, dtype)
    assert_within_rule(run_block(lora, vendor_backward=True)["dx"], reference["dx"], plain["dx"], "dx")


def test_vendor_gemm_of_strided_and_of_no_tokens(device: torch.device) -> None:
    b = make_block(37, 50, LORA, torch.bfloat16, device)
    b.projections[0] = change(b.projections[0], spread_any)
    b.x, b.dys = spread_any(b.x), [spread_any(b.dys[0]), b.dys[1], transposed(b.dys[2])]  # type: ignore[arg-type]
    check(b, vendor_forward=True, vendor_backward=True)
    b.x, b.dys = b.x[:0], [dy[:0] for dy in b.dys if dy is not None]
    assert run_block(b, vendor_forward=True, vendor_backward=True)["dx"].shape == (0, 50)


def test_vendor_gemm_refuses_dx_of_dora(device: torch.device) -> None:
    with pytest.raises(ValueError, match="for LoRA"):
        run_block(make_block(3, 40, QKV, torch.float32, device), vendor_backward=True)


def test_masks_differ(device: torch.device) -> None:
    """Two projections with equal adapters and unequal seeds have unequal S; with equal seeds, equal S."""
    b = make_block(20, 40, [Kind(n=20, r=5), Kind(n=20, r=5)], torch.float32, device, dropout_p=0.3)
    _, S, _ = stacked_forward(b.x, b.projections, b.dropout_p, b.seeds)
    assert not torch.equal(S[:, :5], S[:, 5:])
    assert b.seeds is not None
    _, S, _ = stacked_forward(b.x, b.projections, b.dropout_p, b.seeds[:1].repeat(2))
    assert torch.equal(S[:, :5], S[:, 5:])


def test_adapters_of_two_dtypes(device: torch.device) -> None:
    b = make_block(37, 50, QKV, torch.bfloat16, device, adapter=torch.float32)
    b.projections[2] = make_block(37, 50, QKV, torch.bfloat16, device).projections[2]
    check(b)


def change(p: Projection, make: object) -> Projection:
    """`p` with every tensor replaced by `make` of it; norm stays, it is contiguous by contract."""
    names = ("weight", "bias", "lora_A", "lora_B", "magnitude")
    return replace(p, **{name: make(value) for name in names if (value := getattr(p, name)) is not None})  # type: ignore[operator]


def spread_any(tensor: Tensor) -> Tensor:
    return spread(tensor) if tensor.dim() == 2 else spread(tensor[None])[0]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


@pytest.mark.parametrize("make", [spread_any, transposed], ids=["spread", "transposed"])
def test_strides(make: object, device: torch.device) -> None:
    """One projection only has other strides than its neighbours, and x and a gradient do."""
    b = make_block(37, 50, QKV, torch.bfloat16, device)
    b.projections[1] = change(b.projections[1], make)
    b.x = make(b.x)  # type: ignore[operator]
    b.dys = [make(b.dys[0]), b.dys[1], b.dys[2][:1, :1].expand(37, 20)]  # type: ignore[operator,index]
    check(b)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-6, 2])
def test_scaling_of_any_size(scaling: float, device: torch.device) -> None:
    b = make_block(20, 40, QKV, torch.float32, device)
    b.projections[0] = replace(b.projections[0], scaling=scaling)
    check(b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_zero_tokens(dropout_p: float, device: torch.device) -> None:
    b = make_block(1, 40, QKV, torch.bfloat16, device, dropout_p=dropout_p)
    b.x, b.dys = b.x[:0], [dy[:0] for dy in b.dys if dy is not None]
    found = run_block(b)
    assert found["S"].shape == (0, 61)
    assert found["dx"].shape == (0, 40)
    assert [found[f"y{i}"].shape[1] for i in range(3)] == [70, 20, 20]
    for i, p in enumerate(b.projections):
        for name, like in {"dA": p.lora_A, "dB": p.lora_B, "dm": p.magnitude, "dbias": p.bias}.items():
            assert like is None or torch.equal(found[f"{name}{i}"], torch.zeros_like(like)), name


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_output_without_gradient(absent: int, device: torch.device) -> None:
    """A projection that nothing depends on takes no part in backward."""
    b = make_block(20, 40, QKV, torch.float32, device, dropout_p=0.3)
    b.dys[absent] = None
    found = run_block(b)
    reference, plain = evaluate_block(b, torch.float64), evaluate_block(b, torch.float32)
    assert f"dA{absent}" not in found
    for name in ("dx", *(f"{name}{i}" for name in ("dA", "dB") for i in range(3) if i != absent)):
        assert_within_rule(found[name], reference[name], plain[name], name)


@pytest.mark.parametrize("vendor", [False, True], ids=["fused", "vendor"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_guarded_rows(dtype: torch.dtype, vendor: bool, device: torch.device) -> None:
    """m = 0, m near 0 and a zero row of one projection: no other row's bits move, nor its neighbours'."""
    b = make_block(37, 50, QKV, dtype, device)
    before = run_block(b, vendor_forward=vendor)
    q = b.projections[1]
    q = replace(q, **{f: getattr(q, f).clone() for f in ("weight", "lora_B", "magnitude", "norm")})
    q.magnitude[3], q.magnitude[4] = 0.0, 1e-36  # type: ignore[index]
    q.weight[5], q.lora_B[5], q.norm[5] = 0.0, 0.0, 0.0  # type: ignore[index]
    b.projections[1] = q
    after = run_block(b, vendor_forward=vendor)
    others = torch.tensor([i for i in range(20) if i not in (3, 4, 5)], device=device)
    for name, dim in {"y1": 1, "dB1": 0, "dm1": 0}.items():
        found, same = (values[name].index_select(dim, others) for values in (after, before))
        assert torch.equal(found, same), name
    for name, tensor in after.items():
        assert torch.isfinite(tensor).all(), name
        if name not in ("dx", "y1", "dA1", "dB1", "dm1"):
            assert torch.equal(tensor, before[name]), name
    assert not after["y1"][:, 5].any()
    assert not after["dB1"][5].any()
    assert not after["dm1"][5].any()
    if dtype != torch.float16:  # which cannot hold 2^-100 z
        assert after["y1"][:, 3].any()
        assert after["y1"][:, 3:5].abs().max() < 1e-28


@pytest.mark.parametrize("asked", ["x", "A", "B", "m", "bias", "none"])
def test_only_asked_for_gradients(asked: str, device: torch.device) -> None:
    """One at a time, of one projection, and None for the rest."""
    b = make_block(20, 40, QKV, torch.float32, device)
    i = {"A": 2, "B": 2, "m": 1, "bias": 0}.get(asked, 0)
    ys, S, _ = stacked_forward(b.x, b.projections)
    flags = {f"need_{name}": [name == asked and j == i for j in range(3)] for name in ("A", "B", "m", "bias")}
    x, kept = b.x if asked == "A" else None, ys if asked == "m" else [None] * 3
    found = stacked_backward(b.dys, x, b.projections, S, kept, [False] * 3, need_x=asked == "x", **flags)
    results = {"x": [found.dx], "A": found.dA, "B": found.dB, "m": found.dm, "bias": found.dbias}
    reference, plain = evaluate_block(b, torch.float64), evaluate_block(b, torch.float32)
    for name, values in results.items():
        for j, value in enumerate(values):
            assert (value is not None) == (name == asked and j == i)
            if value is not None:
                expected = "dx" if name == "x" else f"d{name}{j}"
                assert_within_rule(value, reference[expected], plain[expected], expected)


@pytest.mark.parametrize(("m", "k"), [(130, 30), (20, 130)], ids=["tokens-split", "columns-split"])
def test_two_runs_are_bitwise_equal(m: int, k: int, device: torch.device) -> None:
    b = make_block(m, k, NARROW, torch.bfloat16, device, adapter=torch.float32)
    first, second = run_block(b), run_block(b)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("m", "k", "kinds", "dtype", "dropout_p"),
    [
        pytest.param(19, 40, QKV, torch.bfloat16, 0.3, id="qkv-dropout-bf16"),
        pytest.param(19, 40, QKV, torch.float32, 0.0, id="qkv-fp32"),
        pytest.param(130, 30, NARROW, torch.bfloat16, 0.0, id="tokens-split"),
        pytest.param(20, 130, NARROW, torch.bfloat16, 0.0, id="columns-split"),
    ],
)
def test_nothing_stray(
    m: int, k: int, kinds: list[Kind], dtype: torch.dtype, dropout_p: float, device: torch.device
) -> None:
    """NaN round the inputs, NaN in the outputs, guard zones beside them, addresses checked: the same bits."""
    b = make_block(m, k, kinds, dtype, device, dropout_p=dropout_p)
    expected = run_block(b)

    def wrap(tensor: Tensor) -> Tensor:
        wrapped = memory.surrounded_by_nan(tensor if tensor.dim() == 2 else tensor[None])
        return wrapped if tensor.dim() == 2 else wrapped[0]

    b.x, b.dys = wrap(b.x), [wrap(dy) for dy in b.dys if dy is not None]
    b.projections = [change(p, wrap) for p in b.projections]
    with memory.every_guard(b):
        found = run_block(b)
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), f"{name}: NaN was read, or elements were not written"
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_shipped_tiles(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of real devices, not the interpreter's, give the same numbers."""
    monkeypatch.setitem(configs.TABLES, "interpreter", configs.TABLES[arch])
    kinds = [Kind(n=150, r=20), Kind(n=40, r=5, dora=True)]
    check(make_block(40, 50, kinds, torch.bfloat16, device, dropout_p=0.3))


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        ({"lora_B": None}, ValueError),
        ({"weight": torch.zeros(20, 41)}, ValueError),
        ({"weight": torch.zeros(20, 40, dtype=torch.bfloat16)}, TypeError),
        ({"bias": torch.zeros(21)}, ValueError),
        ({"norm": None}, ValueError),
        ({"lora_A": None, "lora_B": None}, ValueError),
    ],
    ids=["half-adapter", "width", "dtype", "bias-width", "half-dora", "dora-without-adapter"],
)
def test_wrong_projections_are_refused(broken: dict[str, Tensor], error: type[Exception]) -> None:
    b = make_block(3, 40, QKV, torch.float32, torch.device("cpu"))
    b.projections[1] = replace(b.projections[1], **broken)
    with pytest.raises(error):
        stacked_forward(b.x, b.projections)


def test_wrong_arguments_are_refused() -> None:
    b = make_block(3, 40, QKV, torch.float32, torch.device("cpu"))
    for call in (
        lambda: stacked_forward(b.x, []),
        lambda: stacked_forward(b.x, [*b.projections, b.projections[0]]),
        lambda: stacked_forward(b.x, b.projections, 0.3),
        lambda: stacked_forward(b.x, b.projections, 0.3, torch.zeros(2, dtype=torch.int64)),
        lambda: stacked_forward(b.x, b.projections, keep_z=[True]),
        lambda: stacked_backward(
            b.dys, None, b.projections, torch.zeros(3, 61), [None] * 3, [False] * 3, need_x=False, **wants(b)
        ),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - six messages, one a call
            call()
