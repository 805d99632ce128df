"""Forward and backward go their own ways, and nothing is recorded where nobody differentiates."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from fastpeft.ops import blocked, cpu_gemm, dora, few_tokens, gated_mlp, lora, lora_add, stacked
from fastpeft_kernels.projection import Projection
from tests.tolerance import assert_within_rule

K, R = 12, 3
BF16 = torch.bfloat16


def leaves() -> list[Tensor]:
    """x, W, A, B and m, in fp64; W is frozen."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, K), (K, K), (R, K), (K, R), (K,))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.requires_grad_(i != 1) for i, t in enumerate(made)]


def call(op: str, x: Tensor, W: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
    if op == "lora":
        return lora.lora_linear(x, W, None, A, B, scaling=0.7)
    if op == "dora":
        return dora.dora_linear(x, W, None, A, B, m, scaling=0.7)
    if op == "lora_add":
        return lora_add.lora_add(x, x, A, B, scaling=0.7)
    p = Projection(weight=W, lora_A=A, lora_B=B, scaling=0.7)
    if op == "stacked":
        return sum(stacked.stacked_linear(x, [p, p]))  # type: ignore[return-value]  # two tensors
    return gated_mlp.gated_mlp(x, p, p, p)


FUNCTIONS = {
    "lora": lora._LoRALinear,
    "dora": dora._DoRALinear,
    "lora_add": lora_add._LoRAAdd,
    "stacked": stacked._StackedLinear,
    "gated": gated_mlp._GatedMLP,
}


def gradients(op: str, dtype: torch.dtype) -> list[Tensor]:
    made = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in leaves()]
    y = call(op, *made)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    trained = [t for t in made if t.requires_grad]
    return [g for g in torch.autograd.grad(y, trained, dy, allow_unused=True) if g is not None]


@pytest.mark.parametrize("tokens_are_few", [False, True])
@pytest.mark.parametrize("op", ["lora", "dora", "stacked", "gated"])
def test_backward_alone_in_fp32(op, tokens_are_few, monkeypatch):
    monkeypatch.setattr(few_tokens, "MAX_TOKENS", -1)
    monkeypatch.setattr(cpu_gemm, "fp32_from", lambda dtype, backward: cpu_gemm.NEVER)
    reference, native = gradients(op, torch.float64), gradients(op, BF16)
    monkeypatch.setattr(few_tokens, "MAX_TOKENS", 10**9 if tokens_are_few else -1)
    monkeypatch.setattr(cpu_gemm, "fp32_from", lambda dtype, backward: 0 if backward else cpu_gemm.NEVER)
    with (
        mock.patch.object(blocked, "forward", wraps=blocked.forward) as forward,
        mock.patch.object(blocked, "backward", wraps=blocked.backward) as backward,
    ):
        found = gradients(op, BF16)
    assert not forward.called
    assert backward.called
    for i, (got, exact, plain) in enumerate(zip(found, reference, native, strict=True)):
        assert_within_rule(got, exact, plain, f"{op}, gradient {i}")


@pytest.mark.parametrize("op", FUNCTIONS)
def test_nothing_is_recorded_where_nobody_differentiates(op):
    made = leaves()
    expected = call(op, *made)
    with mock.patch.object(FUNCTIONS[op], "apply", side_effect=AssertionError("autograd's Function")):
        with torch.no_grad():
            assert torch.equal(call(op, *made), expected)
        assert torch.equal(call(op, *(t.detach() for t in made)), expected)
        with torch.inference_mode():
            assert torch.equal(call(op, *made), expected)
