"""Decoding, LoRA and DoRA for 1 to 16 tokens, against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastpeft_kernels import configs, decode, dora_decode, launch, lora_decode, row_norm
from tests.kernels import forward, memory
from tests.kernels.dora_reference import DoraProblem, make_dora

# (M, K, N, r). The interpreter pretends to have 4 units: 8 programs are wanted, tiles of 32 columns, 16 of K.
SHAPES = [
    pytest.param(1, 150, 47, 5, id="one-token-2-splits"),
    pytest.param(16, 300, 30, 1, id="r1-4-splits"),
    pytest.param(7, 64, 64, 16, id="even-r16"),
    pytest.param(3, 17, 19, 64, id="r64-above-in-and-out"),
    pytest.param(5, 40, 300, 9, id="no-split"),
]


def lora(p: DoraProblem) -> dict[str, Tensor | None]:
    return {"y": lora_decode(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling)}


def dora(p: DoraProblem, norm: Tensor | None = None) -> dict[str, Tensor | None]:
    y = dora_decode(p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.magnitude, norm, p.scaling)
    return {"y": y}


def given_norm(p: DoraProblem) -> Tensor:
    return row_norm(p.weight, p.lora_A, p.lora_B, p.scaling)


def splits(p: DoraProblem) -> int:
    row = configs.TABLES["interpreter"][configs.DECODE][0]
    tiles = launch.cdiv(p.weight.shape[0], row.block_n)
    units = decode.PROGRAMS_PER_UNIT * launch.INTERPRETER_UNITS
    return launch.split_reduction(tiles, launch.cdiv(p.weight.shape[1], row.block_k), units)[0]


@pytest.mark.interpreted
def test_cases_split_and_do_not() -> None:
    found = {splits(make_dora(*case.values, torch.float32, torch.device("cpu"))) for case in SHAPES}
    assert found >= {1, 2, 4}


@pytest.mark.parametrize("dtype", forward.DTYPES.values(), ids=forward.DTYPES.keys())
@pytest.mark.parametrize(("m", "k", "n", "r"), SHAPES)
def test_ragged(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(m, k, n, r, dtype, device)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)
    forward.check(p, dora(p, given_norm(p)), dora=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("k", [150, 40], ids=["split", "whole"])
def test_fp32_adapters_without_bias(k: int, dtype: torch.dtype, device: torch.device) -> None:
    p = make_dora(4, k, 45, 5, dtype, device, adapter=torch.float32, bias=False)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)


@pytest.mark.parametrize("k", [150, 40], ids=["split", "whole"])
def test_strides(k: int, device: torch.device) -> None:
    p = make_dora(9, k, 45, 5, torch.bfloat16, device)
    q = forward.strided(p)
    forward.check(p, lora(q), dora=False)
    forward.check(p, dora(q), dora=True)


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-6, 3e4, 2])
def test_scaling_of_any_size(scaling: float, device: torch.device) -> None:
    p = make_dora(3, 150, 45, 5, torch.float32, device)
    p.scaling = scaling
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)


@pytest.mark.parametrize("k", [150, 40], ids=["split", "whole"])
def test_guarded_rows(k: int, device: torch.device) -> None:
    """A row of norm 0 gives 0 without a bias; m = 0 gives 2^-100 z; no other row's bits move."""
    p = make_dora(6, k, 40, 5, torch.float32, device, bias=False)
    q = replace(p, weight=p.weight.clone(), lora_B=p.lora_B.clone(), magnitude=p.magnitude.clone())
    q.weight[3], q.lora_B[3], q.magnitude[7] = 0.0, 0.0, 0.0
    found, expected, z = dora(q)["y"], dora(p)["y"], lora(p)["y"]
    assert not found[:, 3].any()
    torch.testing.assert_close(found[:, 7] * 2.0**100, z[:, 7], rtol=1e-5, atol=0.0)
    others = [i for i in range(40) if i not in (3, 7)]
    assert torch.equal(found[:, others], expected[:, others])


def test_zero_tokens(device: torch.device) -> None:
    p = make_dora(0, 50, 45, 5, torch.bfloat16, device)
    assert lora(p)["y"].shape == dora(p)["y"].shape == (0, 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(16, 300, 37, 5), (7, 50, 45, 40), (1, 1, 1, 1)], ids=["split", "r40", "ones"]
)
def test_nothing_stray(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> None:
    """NaN round the inputs, NaN in outputs and partials, guards, addresses checked: the same bits, twice."""
    p = make_dora(m, k, n, r, dtype, device, adapter=torch.float32)
    norm = given_norm(p)
    expected = [lora(p), dora(p, norm)]
    q = forward.in_nan(p)
    with memory.every_guard(q, norm):
        found = [lora(q), dora(q, norm)]
    for before, after in zip(expected, found, strict=True):
        assert torch.isfinite(after["y"]).all(), "NaN was read, or elements were not written"
        assert torch.equal(after["y"], before["y"])
    assert not launch.counters(1, p.x).any(), "the counters are left at zero"


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", ["sm_90", "gfx1100", "unaligned"])
def test_shipped_tiles(arch: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.TABLES, "interpreter", configs.TABLES[arch])
    p = make_dora(11, 1100, 70, 20, torch.bfloat16, device, adapter=torch.float32)
    forward.check(p, lora(p), dora=False)
    forward.check(p, dora(p), dora=True)


@pytest.mark.parametrize(("m", "r"), [(17, 2), (3, 65)], ids=["tokens", "rank"])
def test_what_does_not_fit_is_refused(m: int, r: int, device: torch.device) -> None:
    p = make_dora(m, 5, 6, r, torch.float32, device)
    for run in (lora, dora):
        with pytest.raises(ValueError, match="up to 16 tokens and r up to 64"):
            run(p)


def test_wrong_magnitude_is_refused(device: torch.device) -> None:
    p = make_dora(3, 5, 6, 2, torch.float32, device)
    p.magnitude = p.magnitude[:5]
    for norm in (None, torch.ones(6, device=device)):
        with pytest.raises(ValueError, match="magnitude"):
            dora(p, norm)
