"""How many launches each path makes, and that split reductions leave their counters as they found them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.jit import JITFunction

from fastpeft_kernels import (
    configs,
    dora_backward,
    dora_forward,
    launch,
    lora_backward,
    lora_forward,
    row_norm,
)
from fastpeft_kernels.primitives import RowScale
from tests.kernels import interpreter
from tests.kernels.dora_reference import make_dora
from tests.kernels.reference import make_problem
from tests.kernels.test_dropout import seed_of

EVERYTHING = {"need_x": True, "need_A": True, "need_B": True, "need_bias": True}


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels that are launched."""
    names: list[str] = []
    owner, method = (
        (triton_interpreter.GridExecutor, "__call__") if interpreter.ACTIVE else (JITFunction, "run")
    )
    original = getattr(owner, method)

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        names.append(self.fn.__name__)
        return original(self, *arguments, **keywords)

    with mock.patch.object(owner, method, run):
        yield names


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("r", "backward"), [(5, 3), (32, 3), (40, 4)])
def test_lora(r: int, backward: int, dropout_p: float, device: torch.device) -> None:
    """Forward 2, backward 3; 4 above the rank whose products share one read of dY (32 in this table)."""
    p = make_problem(130, 70, 45, r, torch.bfloat16, device)
    seed = seed_of(1, device)
    layer = (p.lora_A, p.lora_B)
    with counted() as names:
        _, S = lora_forward(p.x, p.weight, p.bias, *layer, p.scaling, dropout_p, seed)
    assert names == ["down_projection_kernel", "rank_r_gemm_kernel"]
    with counted() as names:
        lora_backward(p.dy, p.x, p.weight, *layer, S, p.scaling, dropout_p, seed, **EVERYTHING)
    assert len(names) == backward, names


@pytest.mark.parametrize(
    ("dropout_p", "drop_base", "gemm"),
    [
        (0.0, True, "rank_r_gemm_kernel"),
        (0.3, True, "two_product_gemm_kernel"),
        (0.3, False, "rank_r_gemm_kernel"),
    ],
    ids=["plain", "drop-base", "adapter-only"],
)
@pytest.mark.parametrize(("r", "backward"), [(5, 3), (40, 4)])
def test_dora(
    r: int, backward: int, dropout_p: float, drop_base: bool, gemm: str, device: torch.device
) -> None:
    """Norm 1, forward 2, backward 3 (4 above the rank that shares a read), nothing of torch's in between."""
    p = make_dora(130, 70, 45, r, torch.bfloat16, device)
    seed = seed_of(1, device)
    with counted() as names:
        norm = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
    assert names[-1] == "row_norm_kernel"
    # Above the table's rank tile, the Gram matrix is a launch of its own.
    assert len(names) == (1 if r <= 32 else 2)
    layer = (p.weight, p.lora_A, p.lora_B, p.magnitude, norm)
    with counted() as names:
        _, S, z = dora_forward(
            p.x, p.weight, p.bias, *layer[1:], p.scaling, dropout_p, seed, drop_base=drop_base, keep_z=True
        )
    assert names == ["down_projection_kernel", gemm]
    with counted() as names:
        dora_backward(
            *(p.dy, p.x, z, *layer, S, p.scaling, dropout_p, seed),
            drop_base=drop_base,
            kept_is_z=True,
            need_m=True,
            **EVERYTHING,
        )
    assert len(names) == backward, names
    assert names[-1] == gemm


@pytest.mark.parametrize("m", [5, 64, 130, 257])
def test_counters_are_left_at_zero(m: int, device: torch.device) -> None:
    """Split over K, over tokens and over tiles of N, with runs of rows that are full, short and empty."""
    p = make_problem(m, 70, 100, 20, torch.float32, device)
    _, S = lora_forward(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)
    lora_backward(p.dy, p.x, p.weight, p.lora_A, p.lora_B, S, p.scaling, **EVERYTHING)
    assert not launch.counters(1, p.x).any()


@pytest.mark.parametrize("table", configs.TABLES)
def test_one_read_of_dy_serves_the_usual_ranks(table: str) -> None:
    assert configs.TABLES[table][configs.GRAD_S_B][-1].block_r >= 16
    assert configs.TABLES[table][configs.GRAD_S_B_DORA][-1].block_r >= 16


def test_row_scale_is_made_once(device: torch.device) -> None:
    """Backward's first pass fills c for the GEMM: the same bits as torch's division."""
    from fastpeft_kernels.reduce_dy import reduce_dy

    for r in (5, 40):
        p = make_dora(20, 30, 45, r, torch.float32, device)
        norm = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
        c = torch.empty(45, device=device)
        S = torch.ones(20, r, device=device)
        scale = RowScale(magnitude=p.magnitude, norm=norm, c=c)
        reduce_dy(p.dy, p.lora_B, S, 1.0, need_S=True, need_B=True, bias_dtype=None, row_scale=scale)
        assert torch.equal(c, p.magnitude / norm)
