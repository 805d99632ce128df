"""What the tests of the forward's alternatives share: cases, strides, guards, the rule."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from fastpeft_kernels import lora_forward
from tests.kernels import memory
from tests.kernels.dora_reference import DoraProblem, evaluate_dora
from tests.kernels.reference import evaluate
from tests.tolerance import assert_within_rule

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def operands(p: DoraProblem) -> dict[str, Tensor]:
    return {
        field.name: value
        for field in fields(p)
        if isinstance(value := getattr(p, field.name), Tensor) and field.name not in ("keep", "dy")
    }


def spread(tensor: Tensor) -> Tensor:
    """Equal values at strides (2 * columns + 6, 2), or (2,): NaN between the elements."""
    columns = tensor.shape[-1]
    out = tensor.new_full((*tensor.shape[:-1], 2 * columns + 6), float("nan"))[..., 3 : 3 + 2 * columns : 2]
    return out.copy_(tensor)


def strided(p: DoraProblem) -> DoraProblem:
    """No operand contiguous, the weight the transposed view of a Conv1D weight."""
    values = {name: spread(value) for name, value in operands(p).items()}
    return replace(p, **(values | {"weight": p.weight.t().contiguous().t()}))


def in_nan(p: DoraProblem) -> DoraProblem:
    """Every operand a view into storage that is NaN all round."""
    wrap = memory.surrounded_by_nan
    values = {
        name: wrap(value) if value.dim() == 2 else wrap(value[None])[0] for name, value in operands(p).items()
    }
    return replace(p, **values)


def drop(p: DoraProblem, dropout_p: float, seed: Tensor) -> DoraProblem:
    """The problem with the mask that `seed` means, read out of the split forward through `S = drop(1) I`."""
    m, k = p.x.shape
    ones, identity = torch.ones(m, k, device=seed.device), torch.eye(k, device=seed.device)
    _, S = lora_forward(ones, torch.zeros_like(ones[:1]), None, identity, ones[:1], 1.0, dropout_p, seed)
    return replace(p, keep=S != 0, dropout_p=dropout_p, drop_base=False)


def check(p: DoraProblem, found: dict[str, Tensor | None], *, dora: bool) -> None:
    """Each result by the rule against fp64; those that are None were not asked for."""
    reference, plain = (
        (evaluate_dora if dora else evaluate)(p.to(dtype)) for dtype in (torch.float64, p.x.dtype)
    )
    for name, tensor in found.items():
        if tensor is not None:
            assert tensor.dtype == (torch.float32 if name == "norm" else p.x.dtype), name
            assert tensor.is_contiguous(), name
            assert_within_rule(tensor, reference[name], plain[name], name)
