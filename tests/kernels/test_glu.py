"""Gated MLPs, forward and backward without h or dh, against fp64 by the rule of tests/tolerance.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastpeft_kernels import Projection, configs, glu_backward, glu_forward
from fastpeft_kernels.activation import ACTIVATIONS
from tests.kernels import memory
from tests.kernels.block_reference import Kind, Mlp, evaluate_mlp, make_mlp, run_mlp
from tests.kernels.test_numerics import DTYPES, spread
from tests.tolerance import assert_within_rule

Kinds = tuple[Kind, Kind, Kind]

# Gate, up, down; the inner width of 90 is several column parts and no multiple of one.
LORA: Kinds = (Kind(n=90, r=5), Kind(n=90, r=40), Kind(n=33, r=16))
DORA: Kinds = (
    Kind(n=90, r=16, dora=True, bias=True),
    Kind(n=90, r=5, dora=True),
    Kind(n=33, r=5, dora=True, bias=True),
)
MIXED: Kinds = (Kind(n=45, bias=True), Kind(n=45, r=1), Kind(n=20, r=20, dora=True))
BARE: Kinds = (Kind(n=45), Kind(n=45), Kind(n=20, bias=True))
CASES = {"lora": LORA, "dora": DORA, "mixed": MIXED, "bare": BARE}


def check(p: Mlp) -> None:
    found, dtype = run_mlp(p), p.dy.dtype
    reference, plain = evaluate_mlp(p, torch.float64), evaluate_mlp(p, dtype)
    assert set(found) == set(reference)
    for name, tensor in found.items():
        assert_within_rule(tensor, reference[name], plain[name], name)
    assert all(found[name].dtype == dtype for name in ("g", "u", "h", "dg", "du", "dx"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kinds", CASES.values(), ids=CASES.keys())
def test_ragged(kinds: Kinds, dtype: torch.dtype, device: torch.device) -> None:
    check(make_mlp(21, 50, kinds, "silu", dtype, device))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    """Gates from -40 to 40: both tails, where gelu's difference cancels."""
    p = make_mlp(20, 16, (Kind(n=45), Kind(n=45, r=5), Kind(n=20, r=5)), activation, dtype, device)
    p.block.x *= 10
    check(p)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kinds", [LORA, MIXED], ids=["lora", "mixed"])
def test_dropout(kinds: Kinds, dtype: torch.dtype, device: torch.device) -> None:
    """Three masks, over x for gate and up and over h, which backward masks without having it."""
    check(make_mlp(19, 40, kinds, "gelu_tanh", dtype, device, dropout_p=0.3))


def test_largest_rank(device: torch.device) -> None:
    """r = 512 in front of the inner width and behind it, above every width there is."""
    kinds = (Kind(n=24, r=512), Kind(n=24, r=5, dora=True), Kind(n=18, r=512))
    check(make_mlp(9, 20, kinds, "silu", torch.bfloat16, device))


def test_one_token(device: torch.device) -> None:
    check(make_mlp(1, 40, DORA, "gelu", torch.bfloat16, device))


def test_strides(device: torch.device) -> None:
    p = make_mlp(21, 40, LORA, "silu", torch.bfloat16, device)
    p.block.projections[0] = replace(p.block.projections[0], weight=spread(p.block.projections[0].weight))
    p.down = replace(p.down, weight=p.down.weight.t().contiguous().t())
    p.block.x, p.dy = spread(p.block.x), spread(p.dy)
    check(p)


def test_strided_pre_activations(device: torch.device) -> None:
    """g and u may be views, as the halves of one buffer are."""
    p = make_mlp(21, 40, LORA, "silu", torch.float32, device)
    expected = run_mlp(p)
    S = expected["S_down"]
    wanted = {"need_h": True, "need_A": True, "need_B": True, "need_m": False, "need_bias": False}
    found = glu_backward(
        p.dy, p.down, S, None, spread(expected["g"]), spread(expected["u"]), "silu", **wanted
    )
    for name in ("dg", "du", "dA"):
        assert torch.equal(getattr(found, name), expected[{"dA": "down_dA0"}.get(name, name)]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_zero_tokens(dropout_p: float, device: torch.device) -> None:
    p = make_mlp(1, 40, DORA, "silu", torch.bfloat16, device, dropout_p=dropout_p)
    p.block.x, p.dy = p.block.x[:0], p.dy[:0]
    found = run_mlp(p)
    assert found["g"].shape == found["h"].shape == found["du"].shape == (0, 90)
    assert (found["S"].shape, found["dx"].shape, found["y"].shape) == ((0, 21), (0, 40), (0, 33))
    for name in ("dA", "dB", "dm", "dbias"):
        like = {"dA": "lora_A", "dB": "lora_B", "dm": "magnitude", "dbias": "bias"}[name]
        assert torch.equal(found[f"down_{name}0"], torch.zeros_like(getattr(p.down, like))), name


def test_only_asked_for(device: torch.device) -> None:
    """Nothing kept without `keep`; in backward None for the rest."""
    p = make_mlp(20, 40, LORA, "silu", torch.float32, device)
    full, reference, plain = run_mlp(p), evaluate_mlp(p, torch.float64), evaluate_mlp(p, torch.float32)
    forward = glu_forward(p.block.x, *p.block.projections, "silu", keep=False)
    assert forward.g is None
    assert forward.u is None
    assert torch.equal(forward.h, full["h"])
    for asked in ("h", "A", "B"):
        flags = {f"need_{name}": name == asked for name in ("h", "A", "B", "m", "bias")}
        found = glu_backward(p.dy, p.down, full["S_down"], None, full["g"], full["u"], "silu", **flags)
        given = [name for name, value in found._asdict().items() if value is not None]
        assert given == {"h": ["dg", "du"], "A": ["dA"], "B": ["dB"]}[asked]
        for name in given:
            expected = {"dA": "down_dA0", "dB": "down_dB0"}.get(name, name)
            assert_within_rule(getattr(found, name), reference[expected], plain[expected], name)


def test_two_runs_are_bitwise_equal(device: torch.device) -> None:
    p = make_mlp(40, 40, MIXED, "gelu", torch.bfloat16, device, dropout_p=0.3)
    first, second = run_mlp(p), run_mlp(p)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_guarded_rows(dtype: torch.dtype, device: torch.device) -> None:
    """m = 0, m near 0 and a zero row, of gate, of up and of down: no other row's bits move."""
    p = make_mlp(17, 33, DORA, "silu", dtype, device)
    before = run_mlp(p)

    def guarded(q: Projection) -> Projection:
        q = replace(q, **{f: getattr(q, f).clone() for f in ("weight", "lora_B", "magnitude", "norm")})
        q.magnitude[3], q.magnitude[4] = 0.0, 1e-36
        q.weight[5], q.lora_B[5], q.norm[5] = 0.0, 0.0, 0.0
        return q

    def others(tensor: Tensor, dim: int) -> Tensor:
        kept = [i for i in range(tensor.shape[dim]) if i not in (3, 4, 5)]
        return tensor.index_select(dim, torch.tensor(kept, device=device))

    of_inner = [(name, 1) for name in ("g", "u", "h", "dg", "du")]
    of_inner += [(f"{name}{i}", 0) for i in (0, 1) for name in ("dB", "dm", "dbias")[: 2 + (i == 0)]]
    of_down = [("y", 1), *((f"down_{name}0", 0) for name in ("dB", "dm", "dbias"))]
    block, down = p.block.projections, p.down
    for projections, changed, names in (
        ([guarded(block[0]), block[1]], down, of_inner),
        ([block[0], guarded(block[1])], down, of_inner),
        (block, guarded(down), [*of_inner[:3], *of_down]),
    ):
        after = run_mlp(replace(p, block=replace(p.block, projections=projections), down=changed))
        for name, tensor in after.items():
            assert torch.isfinite(tensor).all(), name
        for name, dim in names:
            assert torch.equal(others(after[name], dim), others(before[name], dim)), name
    bias = block[0].bias
    assert bias is not None
    after = run_mlp(replace(p, block=replace(p.block, projections=[guarded(block[0]), block[1]])))
    for row in (3, 4, 5):  # 2^-100 z, and nothing, beside a bias
        assert torch.equal(after["g"][:, row], bias[row].expand(17))


@pytest.mark.parametrize(("kinds", "dropout_p"), [(DORA, 0.0), (LORA, 0.3)], ids=["dora", "lora-dropout"])
def test_nothing_stray(kinds: Kinds, dropout_p: float, device: torch.device) -> None:
    """NaN round the inputs, NaN in the outputs, guard zones beside them, addresses checked: the same bits."""
    p = make_mlp(17, 33, kinds, "gelu", torch.bfloat16, device, dropout_p=dropout_p)
    expected = run_mlp(p)

    def wrap(tensor: Tensor) -> Tensor:
        wrapped = memory.surrounded_by_nan(tensor if tensor.dim() == 2 else tensor[None])
        return wrapped if tensor.dim() == 2 else wrapped[0]

    names = ("weight", "bias", "lora_A", "lora_B", "magnitude")
    p.block.projections, (p.down,) = (
        [
            replace(q, **{name: wrap(value) for name in names if (value := getattr(q, name)) is not None})
            for q in projections
        ]
        for projections in (p.block.projections, [p.down])
    )
    p.block.x, p.dy = wrap(p.block.x), wrap(p.dy)
    with memory.every_guard(p):
        found = run_mlp(p)
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), f"{name}: NaN was read, or elements were not written"
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_shipped_tiles(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of real devices, not the interpreter's, give the same numbers."""
    monkeypatch.setitem(configs.TABLES, "interpreter", configs.TABLES[arch])
    check(make_mlp(20, 40, MIXED, "silu", torch.bfloat16, device, dropout_p=0.3))


def test_wrong_arguments_are_refused() -> None:
    p = make_mlp(3, 40, LORA, "silu", torch.float32, torch.device("cpu"))
    gate, up = p.block.projections
    g = torch.zeros(3, 90)
    flags = {"need_h": True, "need_A": True, "need_B": True, "need_m": False, "need_bias": False}
    for call in (
        lambda: glu_forward(p.block.x, gate, up, "relu"),
        lambda: glu_forward(p.block.x, gate, p.down, "silu"),
        lambda: glu_forward(p.block.x, gate, up, "silu", 0.3),
        lambda: glu_backward(p.dy, p.down, torch.zeros(3, 16), None, g[:, :80], g, "silu", **flags),
        lambda: glu_backward(p.dy, p.down, torch.zeros(3, 16), None, g, g[:2], "silu", **flags),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - five messages, one a call
            call()
