"""Forward and backward against fp64, by the rule of tests/tolerance.py."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels import configs, lora_backward, lora_forward
from tests.kernels.reference import Problem, evaluate, make_problem, run_lora
from tests.tolerance import assert_within_rule

GRADIENTS = ("dx", "dA", "dB", "dbias")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# (M, K, N, r): several tiles each way, none a multiple of another's size; r below the tile, on it, over
# several.
SHAPES = [
    pytest.param(33, 50, 47, 1, id="r1"),
    pytest.param(70, 63, 45, 5, id="r5"),
    pytest.param(64, 64, 96, 16, id="even-r16"),
    pytest.param(130, 40, 70, 40, id="r40-two-rank-tiles"),
    pytest.param(35, 70, 40, 130, id="r130-above-in-and-out"),
    pytest.param(1, 33, 17, 8, id="one-token"),
]


def check(p: Problem) -> None:
    found = run_lora(p)
    reference, plain = evaluate(p.to(torch.float64)), evaluate(p.to(p.x.dtype))
    for name, tensor in found.items():
        assert_within_rule(tensor, reference[name], plain[name], name)
    assert found["y"].dtype == found["S"].dtype == found["dx"].dtype == p.x.dtype
    assert (found["dA"].dtype, found["dB"].dtype) == (p.lora_A.dtype, p.lora_B.dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_ragged(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    check(make_problem(m, k, n, r, dtype, device))


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_largest_rank(adapter: torch.dtype, device: torch.device) -> None:
    check(make_problem(9, 20, 18, 512, torch.bfloat16, device, adapter=adapter))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("r", [5, 40])
def test_fp32_adapters(r: int, dtype: torch.dtype, device: torch.device) -> None:
    p = make_problem(70, 50, 45, r, dtype, device, adapter=torch.float32)
    assert p.bias is not None
    p.bias = p.bias.float()
    check(p)


def test_without_bias(device: torch.device) -> None:
    check(make_problem(40, 50, 45, 5, torch.bfloat16, device, bias=False))


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """Equal values at strides (2 * columns + 6, 2): neither rows nor columns are next to each other."""
    rows, columns = tensor.shape
    out = tensor.new_full((rows, 2 * columns + 6), float("nan"))[:, 3 : 3 + 2 * columns : 2]
    return out.copy_(tensor)


STRIDED = {
    "x-transposed": lambda p: setattr(p, "x", p.x.t().contiguous().t()),
    "x-spread": lambda p: setattr(p, "x", spread(p.x)),
    "dy-spread": lambda p: setattr(p, "dy", spread(p.dy)),
    "dy-expanded": lambda p: setattr(p, "dy", p.dy[:1, :1].expand(p.dy.shape)),
    "weight-transposed": lambda p: setattr(p, "weight", p.weight.t().contiguous().t()),
    "weight-spread": lambda p: setattr(p, "weight", spread(p.weight)),
    "adapters-spread": lambda p: (
        setattr(p, "lora_A", spread(p.lora_A)),
        setattr(p, "lora_B", spread(p.lora_B)),
    ),
    "bias-strided": lambda p: setattr(p, "bias", spread(p.bias[None])[0]),
}


@pytest.mark.parametrize("change", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("r", [5, 40])
def test_strides(change, r: int, device: torch.device) -> None:
    p = make_problem(37, 50, 45, r, torch.bfloat16, device)
    change(p)
    check(p)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-6, 3e4, 2])
def test_scaling_of_any_size(scaling: float, device: torch.device) -> None:
    p = make_problem(33, 40, 45, 5, torch.float32, device)
    p.scaling = scaling
    check(p)


@pytest.mark.parametrize("r", [5, 40])
def test_zero_tokens(r: int, device: torch.device) -> None:
    p = make_problem(0, 50, 45, r, torch.bfloat16, device, adapter=torch.float32)
    found = run_lora(p)
    assert found["y"].shape == (0, 45)
    assert found["S"].shape == (0, r)
    assert found["dx"].shape == (0, 50)
    for name, like in {"dA": p.lora_A, "dB": p.lora_B}.items():
        assert torch.equal(found[name], torch.zeros_like(like)), name
    assert not found["dbias"].any()


@pytest.mark.parametrize("r", [5, 40])
@pytest.mark.parametrize("asked", range(16))
def test_only_asked_for_gradients(asked: int, r: int, device: torch.device) -> None:
    """Each subset gives what the full set gives, and None for the rest; x is not needed without dA."""
    p = make_problem(20, 18, 35, r, torch.float32, device)
    flags = {
        name: bool(asked >> bit & 1) for bit, name in enumerate(("need_x", "need_A", "need_B", "need_bias"))
    }
    _, S = lora_forward(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    x = p.x if flags["need_A"] else None
    gradients = lora_backward(p.dy, x, p.weight, p.lora_A, p.lora_B, S, p.scaling, **flags)
    reference, plain = evaluate(p.to(torch.float64)), evaluate(p)
    for name, wanted, gradient in zip(GRADIENTS, flags.values(), gradients, strict=True):
        if wanted:
            assert gradient is not None
            assert_within_rule(gradient, reference[name], plain[name], name)
        else:
            assert gradient is None


@pytest.mark.parametrize("r", [5, 40])
def test_two_runs_are_bitwise_equal(r: int, device: torch.device) -> None:
    p = make_problem(130, 70, 45, r, torch.bfloat16, device, adapter=torch.float32)
    first, second = run_lora(p), run_lora(p)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "unaligned"])
def test_shipped_tiles(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of real devices, not the interpreter's, give the same numbers."""
    monkeypatch.setitem(configs.TABLES, "interpreter", configs.TABLES[arch])
    check(make_problem(70, 50, 300, 20, torch.bfloat16, device, adapter=torch.float32))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError),
        ({"x": torch.zeros(3, 5, dtype=torch.float64)}, TypeError),
        ({"weight": torch.zeros(6, 5, dtype=torch.bfloat16)}, TypeError),
        ({"lora_B": torch.zeros(5, 2)}, ValueError),
        ({"dropout_p": 1.0}, ValueError),
        ({"dropout_p": 0.5}, ValueError),
    ],
    ids=["x-width", "fp64", "mixed-dtypes", "lora_B-shape", "dropout-1", "no-seed"],
)
def test_wrong_arguments_are_refused(change: dict[str, object], error: type[Exception]) -> None:
    arguments = {
        "x": torch.zeros(3, 5),
        "weight": torch.zeros(6, 5),
        "bias": None,
        "lora_A": torch.zeros(2, 5),
        "lora_B": torch.zeros(6, 2),
        "scaling": 1.0,
    }
    with pytest.raises(error):
        lora_forward(**(arguments | change))  # type: ignore[arg-type]
