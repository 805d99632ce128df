"""The choice of how a CPU multiplies 16-bit matrices."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from fastpeft.ops import cpu_gemm


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    cpu_gemm._FOUND.clear()
    monkeypatch.delenv(cpu_gemm.ENVIRONMENT_VARIABLE, raising=False)
    yield
    cpu_gemm._FOUND.clear()


def rates(monkeypatch, own: dict[int, float], backward: bool = False) -> None:
    """Seconds of the 16-bit product by tokens, 1.0 where none are given; fp32's is always 1.0."""

    def least(dtype: torch.dtype, tokens: int, is_backward: bool) -> tuple[float, float]:
        return own.get(tokens, 1.0) if is_backward is backward else 1.0, 1.0

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu_gemm, "_least_seconds", least)


def rows(tokens: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(tokens, 8, dtype=dtype)


def test_the_measurement_decides_with_a_margin(monkeypatch):
    rates(monkeypatch, {4: 1.2, 16: 1.6, 64: 0.1})
    assert cpu_gemm.products_in_fp32(rows(16))
    assert cpu_gemm.products_in_fp32(rows(64)), "from there on"
    assert not cpu_gemm.products_in_fp32(rows(15))
    assert not cpu_gemm.products_in_fp32(rows(512), backward=True)
    assert cpu_gemm.fp32_is_faster(torch.bfloat16)
    rates(monkeypatch, {1: 9.0})
    assert not cpu_gemm.products_in_fp32(rows(1)), "once in a process"
    cpu_gemm._FOUND.clear()
    assert cpu_gemm.products_in_fp32(rows(1))
    cpu_gemm._FOUND.clear()
    rates(monkeypatch, {})
    assert not cpu_gemm.products_in_fp32(rows(10_000))
    assert not cpu_gemm.fp32_is_faster(torch.bfloat16)


def test_backward_is_measured_apart(monkeypatch):
    rates(monkeypatch, {1: 30.0}, backward=True)
    assert cpu_gemm.products_in_fp32(rows(1), backward=True)
    assert not cpu_gemm.products_in_fp32(rows(512))


def test_amx_needs_no_measurement(monkeypatch):
    rates(monkeypatch, {256: 2.0})
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not cpu_gemm.products_in_fp32(rows(512))
    assert cpu_gemm.products_in_fp32(rows(512, torch.float16)), "bf16 is what its tiles multiply"


def test_wide_dtypes_stay_native(monkeypatch):
    rates(monkeypatch, {1: 2.0})
    assert not cpu_gemm.products_in_fp32(rows(512, torch.float32))
    assert not cpu_gemm.products_in_fp32(rows(512, torch.float64), backward=True)
    assert cpu_gemm.products_in_fp32(rows(512, torch.float16))


def test_the_environment_overrides(monkeypatch):
    for choice in ("fp32", "native"):
        monkeypatch.setenv(cpu_gemm.ENVIRONMENT_VARIABLE, choice)
        cpu_gemm._FOUND.clear()
        assert cpu_gemm.products_in_fp32(rows(512)) is (choice == "fp32")
        assert cpu_gemm.products_in_fp32(rows(512), backward=True) is (choice == "fp32")
    monkeypatch.setenv(cpu_gemm.ENVIRONMENT_VARIABLE, "fast")
    cpu_gemm._FOUND.clear()
    with pytest.raises(fastpeft.ConfigError, match="expected one of auto, native, fp32, got 'fast'"):
        cpu_gemm.products_in_fp32(rows(512))


@pytest.mark.parametrize("backward", [False, True])
def test_measuring_leaves_the_generator_alone(backward):
    state = torch.get_rng_state()
    assert all(s > 0 for s in cpu_gemm._least_seconds(torch.bfloat16, 3, backward, repeats=1))
    assert torch.equal(torch.get_rng_state(), state)
