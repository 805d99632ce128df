"""The row norm that proves itself fresh: kernel and layer, what is read and what is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.backend import use_backend
from fastpeft_kernels import kept_norm, launch, row_norm
from tests.kernels import interpreter
from tests.kernels.dora_reference import make_dora
from tests.kernels.test_launch_counts import counted

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(
    n: int, k: int, r: int, dtype: torch.dtype, device: torch.device, adapter: Any = None
) -> Operands:
    p = make_dora(4, k, n, r, dtype, device)
    A, B = p.lora_A, p.lora_B
    return p.weight, A.to(adapter or A.dtype), B.to(adapter or B.dtype)


@pytest.mark.parametrize(
    ("n", "k", "r"), [(40, 24, 3), (70, 45, 5), (130, 300, 16), (7, 1, 1), (1, 9, 1), (300, 20, 40)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_row_norm_and_what_was_kept(n, k, r, dtype, device) -> None:
    W, A, B = operands(n, k, r, dtype, device)
    fresh = kept_norm(W, A, B, 0.5)
    assert torch.equal(fresh[0], row_norm(W, A, B, 0.5))
    mark = fresh[0] + 100.0  # no norm of these: it can only have been copied
    again = kept_norm(W, A, B, 0.5, (mark, fresh[1]))
    assert torch.equal(again[0], mark)
    assert torch.equal(again[1], fresh[1])
    assert not launch.counters(1, W).any()


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_every_bit_of_the_adapters_counts(layout, adapter, device) -> None:
    """Each element of A and of B, its lowest bit; W by one element of every row and column."""
    n, k, r = 9, 6, 2
    W, A, B = operands(n, k, r, torch.bfloat16, device, adapter)
    if layout == "transposed":
        W, A, B = (t.t().contiguous().t() for t in (W, A, B))
    elif layout == "sliced":
        W, A, B = (
            torch.zeros(t.shape[0] + 3, t.shape[1] + 5, dtype=t.dtype, device=t.device)[2:-1, 1:-4].copy_(t)
            for t in (W, A, B)
        )
    mark = torch.full((n,), 7.0, device=device)
    prints = kept_norm(W, A, B, 0.5)[1]
    for changed in (A, B):
        word = torch.int32 if changed.dtype == torch.float32 else torch.int16
        for place in np.ndindex(*changed.shape):
            changed.view(word)[place] ^= 1
            found = kept_norm(W, A, B, 0.5, (mark, prints))
            assert torch.equal(found[0], row_norm(W, A, B, 0.5))
            assert not torch.equal(found[1], prints)
            changed.view(word)[place] ^= 1
    for i in range(max(n, k)):
        W.view(torch.int16)[i % n, i % k] ^= 1
        assert not torch.equal(kept_norm(W, A, B, 0.5, (mark, prints))[0], mark)
        W.view(torch.int16)[i % n, i % k] ^= 1
    W[0, 1] += 1.0  # off the sample: the one thing it cannot see
    assert torch.equal(kept_norm(W, A, B, 0.5, (mark, prints))[0], mark)


def test_what_a_plain_sum_of_bits_would_pass(device) -> None:
    W, A, B = operands(40, 24, 4, torch.float32, device)
    mark = torch.full((40,), 7.0, device=device)
    prints = kept_norm(W, A, B, 0.5)[1]

    def swap(t: torch.Tensor, one: tuple[int, int], two: tuple[int, int]) -> None:
        t[one], t[two] = t[two].clone(), t[one].clone()

    def exchange() -> None:
        A[0, 0], B[0, 0] = B[0, 0].clone(), A[0, 0].clone()

    def bits() -> None:
        A.view(torch.int32)[0, 0] += 1
        A.view(torch.int32)[0, 1] -= 1

    def signs() -> None:
        A[0, 0].neg_()
        A[0, 1].neg_()

    for change in (lambda: swap(A, (0, 0), (3, 7)), lambda: swap(B, (0, 0), (39, 3)), exchange, bits, signs):
        before = A.clone(), B.clone()
        change()
        assert not torch.equal(kept_norm(W, A, B, 0.5, (mark, prints))[0], mark)
        A.copy_(before[0]), B.copy_(before[1])
    assert torch.equal(kept_norm(W, A, B, 0.5, (mark, prints))[0], mark)


def test_bad_input(device) -> None:
    W, A, B = operands(40, 24, 4, torch.float32, device)
    with pytest.raises(ValueError, match=r"lora_A \[r, 24\]"):
        kept_norm(W, A[:, 1:], B, 0.5)
    norm, prints = kept_norm(W, A, B, 0.5)
    with pytest.raises(ValueError, match="fingerprints"):
        kept_norm(W, A, B, 0.5, (norm[1:], prints))


@pytest.mark.skipif(not interpreter.ACTIVE, reason="counts in the interpreter")
def test_w_is_read_only_where_something_changed(device) -> None:
    n, k, r = 128, 256, 16
    W, A, B = operands(n, k, r, torch.bfloat16, device)
    with elements_loaded(W) as count:
        kept = kept_norm(W, A, B, 0.5)
    assert count[0] == n * k + max(n, k)
    with elements_loaded(W) as count, interpreter.checked_addresses():
        kept = kept_norm(W, A, B, 0.5, kept)
    assert count[0] == max(n, k)
    B[5, 5] += 1.0
    with elements_loaded(W) as count:
        kept_norm(W, A, B, 0.5, kept)
    assert count[0] == n * k + max(n, k)


@contextmanager
def elements_loaded(tensor: torch.Tensor) -> Iterator[list[int]]:
    """Counts the elements of a tensor that launches load."""
    count, load = [0], interpreter.Builder.create_masked_load
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        kept = np.broadcast_to(np.asarray(mask.data).astype(bool), pointers.data.shape)
        touched = pointers.data[kept].astype(np.int64)
        count[0] += int(((touched >= first) & (touched < last)).sum())
        return load(self, pointers, mask, *rest, **keywords)

    with mock.patch.object(interpreter.Builder, "create_masked_load", create_masked_load):
        yield count


# --- through the layer


@pytest.fixture
def layer(device) -> Iterator[Any]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 40)).to(device, torch.bfloat16)
    config = fastpeft.LoRA(r=3, use_dora=True, init_lora_weights=False, target_modules="all-linear")
    with use_backend("triton"):
        yield fastpeft.patch(model, config)[0]


def test_decoding_takes_two_launches_and_reads_w_once(layer, device) -> None:
    """The base is one launch; with the proof, its unmerged DoRA is two."""
    x = torch.randn(1, 24, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        first = layer(x)
        with elements_loaded(layer.weight) as count, counted() as names:
            second = layer(x)
    assert names == ["kept_norm_kernel", "decode_kernel"]
    assert torch.equal(first, second)
    if interpreter.ACTIVE:
        assert count[0] == layer.weight.numel() + max(layer.weight.shape)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_forward_takes_a_launch_more_than_with_a_given_norm(layer, context, device) -> None:
    x = torch.randn(40, 24, device=device, dtype=torch.bfloat16)
    for count in ("full", "proof"):
        with context(), counted() as names:
            layer(x)
        assert names[0] == "kept_norm_kernel", count
        assert len(names) == (2 if "single_kernel" in names else 3), names


def test_a_recomputation_takes_its_forwards_norm(layer, device) -> None:
    x = torch.randn(40, 24, device=device, dtype=torch.bfloat16)
    with counted() as names:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert names.count("kept_norm_kernel") == 1


WRITES = {
    "A": lambda layer: layer.lora_A["default"].data[1].mul_(-2.0),
    "B": lambda layer: layer.lora_B["default"].data[7, 2].add_(1.0),
    "W": lambda layer: layer.weight.data.mul_(2.0),
    "load": lambda layer: layer.load_state_dict(
        {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    ),
}


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("write", WRITES)
def test_decoding_is_fresh_after_a_write(write, tokens, layer, device) -> None:
    x = torch.randn(tokens, 24, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        WRITES[write](layer)
        found = layer(x)
        layer._norm_caches.clear()
        assert torch.equal(found, layer(x))


def test_fresh_after_a_fused_step_that_leaves_no_sign(layer, device) -> None:
    x = torch.randn(40, 24, device=device, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(2):
        layer(x).float().square().mean().backward()
        optimizer.step()
        found = layer(x)
        layer._norm_caches.clear()
        assert torch.equal(found, layer(x))
