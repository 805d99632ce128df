"""Which table a device gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastpeft_kernels import configs

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "table"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_86"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
    ],
)
def test_nvidia(capability: tuple[int, int], table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture.__wrapped__(CUDA) == table


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"8\.0 or newer, cuda:0 has 7\.5"):
        configs.architecture.__wrapped__(CUDA)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("gfx90a:sramecc+:xnack-", "gfx942"),
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx950:sramecc+:xnack-", "gfx942"),
        ("gfx1100", "gfx1100"),
        ("gfx1201", "gfx1100"),
    ],
)
def test_amd(name: str, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    assert configs.architecture.__wrapped__(CUDA) == table


def test_cpu() -> None:
    assert configs.architecture(torch.device("cpu")) == "interpreter"
