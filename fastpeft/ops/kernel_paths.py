"""The Triton backend's paths through a linear's forward and LoRA's backward, and which of them runs.

``split`` runs the kernels split at S; ``tma`` the same with TMA loads (sm_90, sm_100); ``single`` one kernel,
for a small rank; ``aten`` the vendor's GEMM and a fused expand-and-scale kernel; ``decode`` one kernel for up
to 16 tokens without gradients. :mod:`fastpeft.choice` measures on a GPU; where nothing is measured, a model
of the launches decides between ``single`` and ``split``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastpeft.choice import choice_key, choose
from fastpeft_kernels.when import MAX_DECODE_TOKENS, MAX_RANK


def kernels() -> Any:
    """Return the kernel package, imported late: it imports Triton on first use."""
    import fastpeft_kernels

    return fastpeft_kernels


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y [tokens, out_features] and S [tokens, r]."""
    k = kernels()
    paths = {"split": k.lora_forward, "aten": k.lora_forward_expand, "single": k.lora_forward_single}
    if k.serves_tma(x, weight.t(), lora_A.shape[0]):
        paths["tma"] = partial(k.lora_forward, tma=True)
    _order(paths, x, weight, lora_A, needs_norm=False, dropout=seed is not None)
    arguments = (x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)
    y, S = _run("lora_forward", paths, x, weight, lora_A, arguments)
    return y, S


def lora_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, lora_A: Tensor, *rest: Any, **needs: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return ``(dx, dA, dB, dbias)``; arguments as ``fastpeft_kernels.lora_backward``."""
    run = kernels().lora_backward
    paths = {"split": run}
    if needs["need_x"]:
        paths["aten"] = partial(run, vendor_gemm=True)
        if kernels().serves_tma(dy, weight, lora_A.shape[0]):
            paths["tma"] = partial(run, tma=True)
    dx, dA, dB, dbias = _run(
        "lora_backward", paths, dy, weight, lora_A, (dy, x, weight, lora_A, *rest), needs
    )
    return dx, dA, dB, dbias


def dora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    *,
    drop_base: bool,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return y, z (or None) [tokens, out_features], S [tokens, r] and n [out_features], given or made."""
    k = kernels()
    before, after = (x, weight, bias, lora_A, lora_B, magnitude), (scaling, dropout_p, seed)

    def with_norm(path: Callable[..., Any]) -> Callable[..., Any]:
        def run() -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
            n = k.row_norm(weight, lora_A, lora_B, scaling) if norm is None else norm
            return (*path(*before, n, *after, drop_base=drop_base, keep_z=keep_z), n)

        return run

    paths: dict[str, Callable[..., Any]] = {"split": with_norm(k.dora_forward)}
    if not drop_base:
        paths["aten"] = with_norm(k.dora_forward_expand)
        if k.serves_tma(x, weight.t(), lora_A.shape[0], keep_z=keep_z):
            paths["tma"] = with_norm(partial(k.dora_forward, tma=True))
        paths["single"] = partial(k.dora_forward_single, *before, norm, *after, keep_z=keep_z)
        _order(paths, x, weight, lora_A, needs_norm=norm is None, dropout=seed is not None)
    # A path of its own cost with the norm and without it.
    op = "dora_forward" if norm is None else "dora_forward_with_norm"
    y, S, z, n = _run(op, paths, x, weight, lora_A, ())
    return y, S, z, n


def decodes(x: Tensor, lora_A: Tensor, seed: Tensor | None) -> bool:
    """Whether ``x`` [..., in_features] is a case for :func:`lora_decode` and :func:`dora_decode`."""
    r, in_features = lora_A.shape
    few = 0 < x.numel() <= MAX_DECODE_TOKENS * in_features
    return few and r <= MAX_RANK and seed is None


def lora_decode(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Return y [tokens, out_features] for a few tokens; S is not kept, so there is no backward."""
    k = kernels()
    arguments = (x, weight, bias, lora_A, lora_B, scaling)
    paths = {"decode": k.lora_decode, "split": lambda *a: k.lora_forward(*a)[0]}
    y: Tensor = _run("lora_decode", paths, x, weight, lora_A, arguments)
    return y


def dora_decode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float,
) -> Tensor:
    """:func:`lora_decode` for DoRA."""
    k = kernels()
    n = k.row_norm(weight, lora_A, lora_B, scaling) if norm is None else norm
    paths = {
        "decode": k.dora_decode,
        "split": lambda *a: k.dora_forward(*a, drop_base=False, keep_z=False)[0],
    }
    arguments = (x, weight, bias, lora_A, lora_B, magnitude, n, scaling)
    y: Tensor = _run("dora_decode", paths, x, weight, lora_A, arguments)
    return y


def _order(
    paths: dict[str, Callable[..., Any]], x: Tensor, weight: Tensor, lora_A: Tensor, **case: bool
) -> None:
    """Leave ``single`` out where it does not exist, and put it first where it is modelled to win."""
    k, (out_features, in_features) = kernels(), weight.shape
    single = paths.pop("single")
    if lora_A.shape[0] > MAX_RANK:
        return
    rest = dict(paths)
    if k.prefers_single(x.shape[0], out_features, in_features, lora_A.shape[0], **case):
        paths.clear()
    paths["single"] = single
    paths.update(rest)


def _run(
    op: str,
    paths: dict[str, Callable[..., Any]],
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    arguments: tuple[Any, ...],
    options: dict[str, Any] | None = None,
) -> Any:
    """Run the path of ``op`` that was chosen for this shape."""
    bound = {name: partial(path, *arguments, **(options or {})) for name, path in paths.items()}
    out_features, in_features = weight.shape
    key = choice_key(x.shape[0], out_features, in_features, lora_A.shape[0], x.dtype)
    return bound[choose(op, bound, key=key, device=x.device)]()
