"""Dropout: one mask for all kernels, a function of seed and position, never stored."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels import configs, lora_forward
from fastpeft_kernels.down_projection import down_projection
from fastpeft_kernels.dropout import PACKED_TILE, packed_like
from tests.kernels.reference import evaluate, make_problem, run_lora
from tests.tolerance import assert_within_rule


def seed_of(value: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def recover_mask(m: int, k: int, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    """The forward's mask, read out through `S = drop(1) I`."""
    if m == 0:
        return torch.ones(0, k, dtype=torch.bool, device=seed.device)
    ones, identity = torch.ones(m, k, device=seed.device), torch.eye(k, device=seed.device)
    _, S = lora_forward(
        ones, torch.zeros(1, k, device=seed.device), None, identity, ones[:1], 1.0, dropout_p, seed
    )
    kept = S != 0
    assert torch.equal(S, kept / (1 - dropout_p)), "kept elements are scaled by 1 / (1 - p), the others are 0"
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("k", "r"), [(50, 5), (64, 40)], ids=["k50-r5", "k64-r40"])
def test_forward_and_backward_share_the_mask(
    k: int, r: int, dtype: torch.dtype, device: torch.device
) -> None:
    """With the mask recovered from forward, every result is the reference's: dA and dx made the same mask."""
    p = make_problem(37, k, 45, r, dtype, device, adapter=torch.float32)
    seed = seed_of(-(2**40) - 3, device)
    p.dropout_p = 0.3
    p.keep = recover_mask(37, k, 0.3, seed)
    found = run_lora(p, seed)
    reference, plain = evaluate(p.to(torch.float64)), evaluate(p.to(dtype))
    for name, tensor in found.items():
        assert_within_rule(tensor, reference[name], plain[name], name)


def test_mask_is_plausible(device: torch.device) -> None:
    """10,000 elements: the rate within four standard deviations, neighbours and other seeds independent."""
    m, k, p = 100, 100, 0.3
    kept = recover_mask(m, k, p, seed_of(1, device)).double()
    four_sigma = 4 * (p * (1 - p) / (m * k)) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < four_sigma
    # Words of one Philox call (columns 4g .. 4g + 3), calls of one row, and rows.
    for a, b in [(kept[:, :-1], kept[:, 1:]), (kept[:, :-4], kept[:, 4:]), (kept[:-1], kept[1:])]:
        assert abs((a * b).mean().item() - (1 - p) ** 2) < 2 * four_sigma
    other = recover_mask(m, k, p, seed_of(2, device)).double()
    assert abs((kept * other).mean().item() - (1 - p) ** 2) < 2 * four_sigma


def test_mask_does_not_depend_on_rows_beside_it(device: torch.device) -> None:
    """Row i has one mask whatever M is, so a microbatch cut from the front of a batch sees the same one."""
    seed = seed_of(5, device)
    assert torch.equal(recover_mask(40, 50, 0.5, seed)[:13], recover_mask(13, 50, 0.5, seed))


def test_packed_mask_is_the_mask(device: torch.device) -> None:
    """What the forward hands to its GEMM under DoRA's dropout, bit j of a byte being column 4 g + j."""
    seed = seed_of(5, device)
    x = torch.ones(37, 50, device=device)
    packed = packed_like(x)
    down_projection(x, x[:5], 1.0, 0.3, seed, packed=packed)
    bits = (packed[:37, :13, None] >> torch.arange(4, device=device)) & 1
    assert torch.equal(bits.reshape(37, 52)[:, :50].bool(), recover_mask(37, 50, 0.3, seed))


@pytest.mark.parametrize("table", configs.TABLES)
def test_packed_mask_holds_whole_tiles(table: str) -> None:
    """It is written and read without masks: every tile along x has to divide what it is rounded up to."""
    rows = configs.TABLES[table]
    for row in (*rows[configs.DOWN_PROJECTION], *rows[configs.RANK_R_GEMM_DORA_DROPOUT]):
        assert PACKED_TILE % row.block_m == PACKED_TILE % row.block_k == 0


def test_seed_decides(device: torch.device) -> None:
    p = make_problem(37, 50, 45, 5, torch.float32, device)
    p.dropout_p = 0.3
    first, second = run_lora(p, seed_of(7, device)), run_lora(p, seed_of(7, device))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["S"], run_lora(p, seed_of(8, device))["S"])


def test_zero_scaling_still_drops_in_dx(device: torch.device) -> None:
    """s = 0 makes dS zero, hence dx = dY W, with dropout or without."""
    p = make_problem(20, 18, 35, 5, torch.float32, device)
    p.scaling, p.dropout_p = 0.0, 0.3
    found = run_lora(p, seed_of(1, device))
    assert_within_rule(found["dx"], p.dy.double() @ p.weight.double(), p.dy @ p.weight, "dx")
    assert not found["dA"].any()
