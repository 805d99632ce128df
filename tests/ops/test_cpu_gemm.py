"""The choice of how a CPU multiplies 16-bit matrices."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from fastpeft.ops import cpu_gemm


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    cpu_gemm.fp32_is_faster.cache_clear()
    monkeypatch.delenv(cpu_gemm.ENVIRONMENT_VARIABLE, raising=False)
    yield
    cpu_gemm.fp32_is_faster.cache_clear()


def rates(monkeypatch, **seconds: float) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(
        cpu_gemm, "_least_seconds", lambda dtypes: [seconds[str(d).removeprefix("torch.")] for d in dtypes]
    )


def test_the_measurement_decides_with_a_margin(monkeypatch):
    x = torch.ones(cpu_gemm.MIN_TOKENS, 8, dtype=torch.bfloat16)
    rates(monkeypatch, bfloat16=1.6, float32=1.0)
    assert cpu_gemm.products_in_fp32(x)
    rates(monkeypatch, bfloat16=9.0, float32=10.0)
    assert cpu_gemm.products_in_fp32(x), "once in a process"
    cpu_gemm.fp32_is_faster.cache_clear()
    rates(monkeypatch, bfloat16=1.2, float32=1.0)
    assert not cpu_gemm.products_in_fp32(x)


def test_amx_needs_no_measurement(monkeypatch):
    rates(monkeypatch)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not cpu_gemm.products_in_fp32(torch.ones(512, 8, dtype=torch.bfloat16))


def test_few_tokens_and_wide_dtypes_stay_native(monkeypatch):
    rates(monkeypatch, bfloat16=2.0, float16=2.0, float32=1.0)
    assert not cpu_gemm.products_in_fp32(torch.ones(cpu_gemm.MIN_TOKENS - 1, 8, dtype=torch.bfloat16))
    assert not cpu_gemm.products_in_fp32(torch.ones(512, 8))
    assert cpu_gemm.products_in_fp32(torch.ones(512, 8, dtype=torch.float16))


def test_the_environment_overrides(monkeypatch):
    x = torch.ones(512, 8, dtype=torch.bfloat16)
    for choice in ("fp32", "native"):
        monkeypatch.setenv(cpu_gemm.ENVIRONMENT_VARIABLE, choice)
        cpu_gemm.fp32_is_faster.cache_clear()
        assert cpu_gemm.products_in_fp32(x) is (choice == "fp32")
    monkeypatch.setenv(cpu_gemm.ENVIRONMENT_VARIABLE, "fast")
    cpu_gemm.fp32_is_faster.cache_clear()
    with pytest.raises(fastpeft.ConfigError, match="expected one of auto, native, fp32, got 'fast'"):
        cpu_gemm.products_in_fp32(x)


def test_measuring_leaves_the_generator_alone():
    state = torch.get_rng_state()
    assert all(s > 0 for s in cpu_gemm._least_seconds((torch.float32, torch.bfloat16), repeats=1))
    assert torch.equal(torch.get_rng_state(), state)
