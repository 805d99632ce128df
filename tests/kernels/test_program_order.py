"""The programs of a grid finish in any order, and every sum has the same bits in all of them.

Under the interpreter the order is permuted; on a GPU it is the hardware's, and the same tests run as they are
against a run without the permutation, which is as good as a second one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastpeft_kernels import (
    bottleneck_up_backward,
    dora_decode,
    kept_norm,
    lora_add_backward,
    lora_decode,
    row_norm,
)
from tests.kernels import interpreter
from tests.kernels.block_reference import Kind, make_block, make_mlp, run_block, run_mlp
from tests.kernels.dora_reference import make_dora, run_dora
from tests.kernels.reference import make_problem, run_lora
from tests.kernels.test_dropout import seed_of

ORDERS = range(3)  # seeds; 0 is from the last to the first
F32, BF16 = torch.float32, torch.bfloat16
SPLIT = [Kind(n=20, r=5), Kind(n=33, r=16, dora=True, bias=True), Kind(n=20, r=7)]
MLP = (Kind(n=40, r=5), Kind(n=40, r=16, dora=True), Kind(n=20, r=40, dora=True, bias=True))
Run = Callable[[], dict[str, Tensor]]


def lora(device: torch.device, m: int, k: int, n: int, r: int) -> Run:
    p = make_problem(m, k, n, r, BF16, device, adapter=F32)
    return lambda: run_lora(p)


def dora(device: torch.device, k: int, n: int, r: int, dropout_p: float = 0.0) -> Run:
    p = make_dora(130, k, n, r, BF16, device, adapter=F32)
    p.dropout_p = dropout_p
    return lambda: run_dora(p, seed=seed_of(5, device))


def decode(device: torch.device) -> Run:
    p = make_dora(7, 300, 30, 9, BF16, device, adapter=F32)
    norm = row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)
    rest = (p.x, p.weight, p.bias, p.lora_A, p.lora_B)
    return lambda: {
        "lora": lora_decode(*rest, p.scaling),
        "dora": dora_decode(*rest, p.magnitude, norm, p.scaling),
        "norm": dora_decode(*rest, p.magnitude, None, p.scaling),
    }


def kept(device: torch.device) -> Run:
    """DoRA's norm with nothing kept, with what still holds, and with what does not: roles go by ticket."""
    p = make_dora(5, 300, 70, 9, BF16, device, adapter=F32)
    rest = (p.lora_B, p.scaling)
    before = kept_norm(p.weight, p.lora_A, *rest)

    def run() -> dict[str, Tensor]:
        found = {
            "fresh": kept_norm(p.weight, p.lora_A, *rest),
            "as it was": kept_norm(p.weight, p.lora_A, *rest, before),
            "stale": kept_norm(p.weight, 2 * p.lora_A, *rest, before),
        }
        return {f"{name} {i}": t for name, pair in found.items() for i, t in enumerate(pair)}

    return run


def updates(device: torch.device) -> Run:
    """LoRA's update on a given base product, and a bottleneck's, backward."""
    p = make_problem(130, 40, 45, 5, BF16, device, adapter=F32)
    S = (p.x @ p.lora_A.to(BF16).T).contiguous()
    wanted = {"need_x": True, "need_A": True, "need_B": True}
    flags = {"need_a": True, "need_up": True, "need_up_bias": True}

    def run() -> dict[str, Tensor]:
        found = lora_add_backward(p.dy, p.x, p.lora_A, p.lora_B, S, 0.7, 0.3, seed_of(5, device), **wanted)
        found += bottleneck_up_backward(p.dy, S, p.lora_B, 1.5, **flags)
        return {str(i): tensor for i, tensor in enumerate(found) if tensor is not None}

    return run


def stacked(device: torch.device, m: int, k: int, dropout_p: float) -> Run:
    b = make_block(m, k, SPLIT, BF16, device, dropout_p=dropout_p)
    return lambda: run_block(b)


def gated(device: torch.device) -> Run:
    p = make_mlp(40, 30, MLP, "gelu", BF16, device, dropout_p=0.3)
    return lambda: run_mlp(p)


# Shapes whose reductions are split in the interpreter's table: over tokens, over K, over tiles of N.
RUNS: dict[str, Callable[[torch.device], Run]] = {
    "lora-tokens-split": lambda device: lora(device, 130, 40, 45, 5),
    "lora-columns-split": lambda device: lora(device, 5, 130, 100, 5),
    "lora-r40": lambda device: lora(device, 130, 30, 30, 40),
    "dora": lambda device: dora(device, 40, 45, 5),
    "dora-dropout": lambda device: dora(device, 40, 45, 5, 0.3),
    "dora-r40": lambda device: dora(device, 30, 30, 40),
    "decode": decode,
    "kept-norm": kept,
    "stacked-tokens-split": lambda device: stacked(device, 130, 30, 0.3),
    "stacked-columns-split": lambda device: stacked(device, 20, 130, 0.0),
    "gated": gated,
    "updates": updates,
}


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_equal_bits_in_every_order(make: Callable[[torch.device], Run], device: torch.device) -> None:
    run = make(device)
    expected = run()
    assert all(torch.isfinite(tensor).all() for tensor in expected.values())
    for seed in ORDERS:
        with interpreter.permuted_programs(seed) if interpreter.ACTIVE else nullcontext():
            found = run()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), f"{name}, order {seed}"


def modules_with(name: str) -> Iterator[ModuleType]:
    """The kernels' modules that have taken `name` out of finish.py."""
    for key, module in list(sys.modules.items()):
        if key.startswith("fastpeft_kernels.") and name in vars(module) and not key.endswith(".finish"):
            yield module


@contextmanager
def grids_with_counters() -> Iterator[set[str]]:
    """The names of the kernels launched with a counter, which is where programs meet."""
    found: set[str] = set()
    executor = interpreter.interpreter.GridExecutor
    original = executor.__call__

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        bound = dict(zip(self.arg_names, arguments, strict=False)) | keywords
        if isinstance(bound.get("p_counter"), Tensor):
            found.add(self.fn.__module__)
        return original(self, *arguments, **keywords)

    with mock.patch.object(executor, "__call__", call):
        yield found


@pytest.mark.interpreted
def test_every_kernel_whose_programs_meet_is_permuted(device: torch.device) -> None:
    """Each module that asks `is_last` is launched split by one of the runs above, or they are too few."""
    expected = {module.__name__ for module in modules_with("is_last")}
    assert len(expected) >= 6
    with grids_with_counters() as found:
        for name in ("lora-tokens-split", "lora-columns-split", "decode", "kept-norm"):
            RUNS[name](device)()
        for m, k in ((130, 30), (20, 130)):  # the stacked ones, whose masks take time
            stacked(device, m, k, 0.0)()
    assert found == expected
