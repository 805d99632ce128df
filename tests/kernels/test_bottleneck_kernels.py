"""The bottleneck's kernels: the update out of place, and what one read of dY gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.launch_traffic import counted
from fastpeft_kernels import bottleneck_up, bottleneck_up_backward, expand_add, launch
from tests.kernels import forward, memory
from tests.tolerance import assert_within_rule

# (M, N, size): several tiles each way; a bottleneck below its tile, on it, and above the widest one.
SHAPES = [
    pytest.param(35, 47, 1, id="size1"),
    pytest.param(70, 45, 5, id="size5"),
    pytest.param(64, 64, 16, id="even-size16"),
    pytest.param(17, 19, 40, id="size40-above-out"),
    pytest.param(1, 17, 130, id="one-token-size130"),
]
FLAGS = ("need_a", "need_up", "need_up_bias")
ALL = dict.fromkeys(FLAGS, True)


def operands(
    m: int, n: int, size: int, dtype: torch.dtype, device: torch.device, adapter: torch.dtype | None = None
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(m * 31 + n * 7 + size)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    own = adapter or dtype
    return {
        "base": make(m, n),
        "a": make(m, size),
        "up": make(n, size, dtype=own) / size**0.5,
        "up_bias": make(n, dtype=own),
        "dy": make(m, n),
    }


def reference(t: dict[str, Tensor], scaling: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """By the formula, in ``dtype``, of operands rounded to the compute dtype."""
    base, a, up, up_bias, dy = (t[name].to(t["base"].dtype).to(dtype) for name in t)
    return {
        "y": base + scaling * (a @ up.T + up_bias),
        "da": scaling * (dy @ up),
        "dup": scaling * (dy.T @ a),
        "dup_bias": scaling * dy.sum(0),
    }


def found(t: dict[str, Tensor], scaling: float) -> dict[str, Tensor | None]:
    y = bottleneck_up(t["base"], t["a"], t["up"], t["up_bias"], scaling)
    da, dup, dup_bias = bottleneck_up_backward(t["dy"], t["a"], t["up"], scaling, **ALL)
    return {"y": y, "da": da, "dup": dup, "dup_bias": dup_bias}


@pytest.mark.parametrize("scaling", [1.0, 1.5])
@pytest.mark.parametrize("dtype", forward.DTYPES.values(), ids=forward.DTYPES.keys())
@pytest.mark.parametrize(("m", "n", "size"), SHAPES)
def test_ragged(m: int, n: int, size: int, dtype: torch.dtype, scaling: float, device: torch.device) -> None:
    t = operands(m, n, size, dtype, device, adapter=torch.float32)
    before = t["base"].clone()
    exact, plain = reference(t, scaling, torch.float64), reference(t, scaling, dtype)
    for name, value in found(t, scaling).items():
        assert value is not None
        assert_within_rule(value, exact[name], plain[name], name)
    assert torch.equal(t["base"], before), "base belongs to the layer"


def test_strides(device: torch.device) -> None:
    t = operands(37, 45, 20, torch.bfloat16, device)
    spread = {name: forward.spread(value) for name, value in t.items()}
    for name, value in found(spread, 1.5).items():
        other = found(t, 1.5)[name]
        assert value is not None
        assert other is not None
        assert torch.equal(value, other), name


@pytest.mark.parametrize("left_out", FLAGS)
def test_what_is_not_asked_for(left_out: str, device: torch.device) -> None:
    t = operands(37, 45, 20, torch.float32, device)
    whole = bottleneck_up_backward(t["dy"], t["a"], t["up"], 1.5, **ALL)
    parts = bottleneck_up_backward(t["dy"], t["a"], t["up"], 1.5, **(ALL | {left_out: False}))
    for flag, one, other in zip(FLAGS, whole, parts, strict=True):
        assert (other is None) == (flag == left_out)
        assert one is not None
        if other is not None:
            torch.testing.assert_close(other, one)


def test_zero_tokens(device: torch.device) -> None:
    t = operands(0, 45, 5, torch.bfloat16, device)
    shapes = [tuple(value.shape) for value in found(t, 1.0).values() if value is not None]
    assert shapes == [(0, 45), (0, 5), (45, 5), (45,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("m", "n", "size"), [(37, 45, 5), (33, 18, 40), (1, 1, 1)], ids=["5", "40", "ones"])
def test_nothing_stray(m: int, n: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """NaN round the inputs, guard zones round the outputs, addresses checked: the same bits, twice."""
    t = operands(m, n, size, dtype, device)
    expected = found(t, 1.5)
    wrapped = {
        name: memory.surrounded_by_nan(v) if v.dim() == 2 else memory.surrounded_by_nan(v[None])[0]
        for name, v in t.items()
    }
    wrapped["base"] = t["base"]  # read whole, as it lies
    with memory.every_guard(wrapped):
        after = found(wrapped, 1.5)
    for name, value in expected.items():
        assert torch.equal(after[name], value), name  # type: ignore[arg-type]


@pytest.mark.interpreted
def test_base_is_read_once_and_the_result_written_once() -> None:
    m, n, size = 256, 384, 64
    wide = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((m, n), (m, size), (n, size))]
    with counted("sm_90", units=4) as launches:
        expand_add(wide[0], wide[1], wide[2].t(), 1.0)
    (item,) = launches
    tiles = (m // 64) * (n // 64)
    assert item.stored == 2 * m * n
    assert item.loaded == 2 * (m * n + tiles * 2 * 64 * size)
    assert item.compulsory == 2 * (2 * m * n + m * size + n * size)


def test_wrong_shapes_are_refused(device: torch.device) -> None:
    t = operands(4, 6, 2, torch.float32, device)
    with pytest.raises(ValueError, match="expected a contiguous"):
        expand_add(t["base"], t["a"][:3], t["up"].t(), 1.0)
    with pytest.raises(ValueError, match="expected a contiguous"):
        expand_add(launch.empty((6, 4), torch.float32, t["a"]).t(), t["a"], t["up"].t(), 1.0)
