"""The harness itself: that its repair is needed and works, and that its guards catch planted errors."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from fastpeft_kernels import launch
from tests.kernels import interpreter, memory

needs_interpreter = pytest.mark.interpreted


@triton.jit
def dot_kernel(p_a, p_b, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    o_tile = o[:, None] * BLOCK + o[None, :]
    tl.store(p_out + o_tile, tl.dot(tl.load(p_a + o_tile), tl.load(p_b + o_tile)))


@triton.jit
def copy_kernel(p_x, p_out, n, n_store, n_load, BLOCK: tl.constexpr):
    """Right for n_load == n_store == n; loads or stores too little or too much for other values."""
    o = tl.arange(0, BLOCK)
    b = tl.load(p_x + o, mask=o < n_load, other=0.0)
    tl.store(p_out + o, b, mask=o < n_store)


def dot_error(device: torch.device) -> float:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    out = torch.empty(16, 16, device=device)
    dot_kernel[(1,)](a, b, out, BLOCK=16)
    expected = a.float() @ b.float()
    return ((out - expected).norm() / expected.norm()).item()


def test_bf16_dot_is_right(device: torch.device) -> None:
    assert dot_error(device) < 1e-6


@triton.jit
def cast_kernel(p_x, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))


def cast(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(device)
    x[0] = 1.998  # rounds up into the next binade
    out = torch.empty(64, dtype=torch.bfloat16, device=device)
    cast_kernel[(1,)](x, out, BLOCK=64)
    return out, x.to(torch.bfloat16)


def test_bf16_cast_rounds_to_nearest(device: torch.device) -> None:
    assert torch.equal(*cast(device))


@needs_interpreter
def test_repairs_are_needed(device: torch.device) -> None:
    """When this fails, Triton has mended its interpreter, and the repair can go."""
    builder = triton_interpreter.InterpreterBuilder
    with mock.patch.object(builder, "create_dot", interpreter.ORIGINAL_DOT):
        assert dot_error(device) > 1.0
    with mock.patch.object(builder, "cast_impl", interpreter.ORIGINAL_CAST):
        assert not torch.equal(*cast(device))


def copy(device: torch.device, *, n_store: int = 10, n_load: int = 10) -> torch.Tensor:
    x = memory.surrounded_by_nan(torch.ones(1, 10, device=device))[0]
    out = launch.empty((10,), torch.float32, x)
    copy_kernel[(1,)](x, out, 10, n_store, n_load, BLOCK=16)
    return out


def test_guards_pass_a_right_kernel(device: torch.device) -> None:
    with memory.guarded_outputs():
        assert torch.equal(copy(device), torch.ones(10, device=device))


def test_unwritten_output_is_caught(device: torch.device) -> None:
    with memory.guarded_outputs():
        assert copy(device, n_store=9).isnan().any()


def test_write_past_the_end_is_caught(device: torch.device) -> None:
    with pytest.raises(memory.GuardError), memory.guarded_outputs():
        copy(device, n_store=12)


@pytest.mark.parametrize("beside", [False, True], ids=["in-it", "beside-it"])
def test_write_into_an_input_is_caught(beside: bool, device: torch.device) -> None:
    """Into its elements, or into the NaN round a view of it."""
    x = memory.surrounded_by_nan(torch.ones(1, 10, device=device))
    source = torch.zeros(16, device=device)
    behind = x.as_strided((1,), (1,), x.storage_offset() + 10)
    start, n = (behind, 1) if beside else (x[0], 10)
    with pytest.raises(memory.ChangedInputError), memory.untouched({"a": [x]}):
        copy_kernel[(1,)](source, start, n, n, n, BLOCK=16)
    if beside:
        assert torch.equal(x, torch.ones_like(x))
    with memory.untouched(x, source):
        copy_kernel[(1,)](source, torch.empty_like(source), n, n, n, BLOCK=16)


def test_read_past_the_end_is_caught(device: torch.device) -> None:
    with pytest.raises(memory.GuardError), memory.guarded_outputs():
        assert copy(device, n_store=12, n_load=12).isnan().sum() == 0


@needs_interpreter
@pytest.mark.parametrize("overrun", [{"n_load": 11}, {"n_store": 11}], ids=["load", "store"])
def test_stray_address_is_caught(device: torch.device, overrun: dict[str, int]) -> None:
    """A stray load is found even though its value is never stored."""
    with interpreter.checked_addresses():
        copy(device)
        with pytest.raises(triton.runtime.errors.InterpreterError, match="outside the arguments"):
            copy(device, **overrun)


@triton.jit
def sum_kernel(p_x, p_out, p_order, p_count, BLOCK: tl.constexpr):
    """The sum in the order of arrival, and that order."""
    i = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_order + i, tl.atomic_add(p_count, 1))
    tl.atomic_add(p_out, tl.load(p_x + i))


@needs_interpreter
def test_a_sum_by_the_order_of_arrival_is_caught(device: torch.device) -> None:
    """Every program runs once, in another order for every seed, and the planted sum has other bits."""
    x = torch.randn(35, generator=torch.Generator().manual_seed(0)).to(device)

    def run() -> tuple[float, list[int]]:
        out, order = torch.zeros(1, device=device), torch.full((35,), -1, dtype=torch.int32, device=device)
        sum_kernel[(7, 5)](x, out, order, torch.zeros(1, dtype=torch.int32, device=device), BLOCK=1)
        return out.item(), order.tolist()

    sums, orders = {}, {"own": run()[1]}
    assert orders["own"] == list(range(35))
    for seed in range(3):
        with interpreter.permuted_programs(seed):
            sums[seed], orders[seed] = run()
        assert sorted(orders[seed]) == list(range(35))
    assert orders[0] == list(range(34, -1, -1))
    assert len({tuple(order) for order in orders.values()}) == 4
    assert len({run()[0], *sums.values()}) > 1
