"""The device that is planned for, where no tensor has memory.

``cpu``: fake tensors that say they are on the CPU. fastpeft's torch backend runs on them call for call, with
its blocked fp32 products and its kept norms.

``cuda``: meta tensors, which need no CUDA build of torch (fake tensors on a GPU do, for autograd). fastpeft's
ops are whole there: what they return and save is what the Triton kernels return and save, and what a kernel's
launcher allocates for the moment, a few [tokens, r], is left out. Attention and dropout are the ones that a
GPU takes: flash attention (memory-efficient attention with a mask or in fp32), and dropout with a mask of
bytes. Nothing of it has been compared with a GPU yet.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft.backend import use_backend
from fastpeft.ops.cpu_gemm import fp32_from
from fastpeft.ops.eager import seen_through
from fastpeft.planning.building import replace_tensors

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
_MASKED, _FLASH_DTYPES = 8, (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def on_device(model: nn.Module, device: Device, dtype: torch.dtype) -> Iterator[Callable[..., Tensor]]:
    """Let a meta model train as if it were on a device; yields what makes a tensor there, as ``torch.zeros``.

    Args:
        model: on the meta device; on its way to a CPU its tensors are replaced.
        device: where to.
        dtype: of its activations.
    """
    if device == "cuda":
        with use_backend("torch"), _in_place_of(F, scaled_dot_product_attention=_attention, dropout=_dropout):
            yield lambda *size, **kwargs: torch.zeros(*size, device="meta", **kwargs)
        return
    if dtype in (torch.bfloat16, torch.float16):
        for backward in (False, True):
            fp32_from(dtype, backward)  # measured now: fake products take no time
    mode = FakeTensorMode()
    with mode:
        replace_tensors(
            model, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
        )
    with use_backend("torch"), seen_through(), _as_if_not_traced(), mode:
        yield lambda *size, **kwargs: torch.zeros(*size, device="cpu", **kwargs)


def _as_if_not_traced() -> contextlib.AbstractContextManager[None]:
    """transformers leaves a mask out where it reads that nothing is masked, and reads no fake tensors."""
    masks = sys.modules.get("transformers.masking_utils")
    if not hasattr(masks, "is_tracing"):
        return contextlib.nullcontext()
    return _in_place_of(masks, is_tracing=lambda tensor=None: False)


@contextlib.contextmanager
def _in_place_of(module: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Inside, a module has other functions under these names.

    A ``TorchFunctionMode`` would be off while it handles ``backward``, so in what checkpointing runs again.
    """
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return input
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """[B, H, S, D] as ``F.scaled_dot_product_attention``; D is padded to a multiple of 8 as it is there."""
    width = query.shape[-1]
    if width % _MASKED:
        query, key, value = (F.pad(t, (0, _MASKED - width % _MASKED)) for t in (query, key, value))
    if attn_mask is None and query.dtype in _FLASH_DTYPES:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    else:
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
    return out[..., :width]
