"""Tiny models whose linears are quantised by bitsandbytes or torchao, the same weights at every call."""

from __future__ import annotations

import copy

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from tests.models import llama


def nf4(
    dtype: torch.dtype, storage: torch.dtype = torch.uint8, *, packs: bool = False, nested: bool = True
) -> nn.Module:
    """4-bit normal floats, as QLoRA's."""

    def convert(linear: nn.Linear) -> nn.Module:
        how = {"quant_type": "nf4", "quant_storage": storage, "compress_statistics": nested}
        made = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, **how
        )
        made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **how)
        if not packs:
            made.support_avx512bf16_for_cpu = False  # PEFT's side too: fastpeft.layers.packed_4bit
        return made.to("cpu")

    model = _converted(dtype, convert)
    model.is_loaded_in_4bit = True
    return model


def nf4_in_bf16(dtype: torch.dtype) -> nn.Module:
    """The same bits, two numbers in what says it is one bf16: for FSDP, which wants one dtype in all."""
    return nf4(dtype, torch.bfloat16)


def int8(dtype: torch.dtype) -> nn.Module:
    """LLM.int8()."""

    def convert(linear: nn.Linear) -> nn.Module:
        made = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
        made.weight = bitsandbytes.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        )
        return made.to("cpu")

    model = _converted(dtype, convert)
    model.is_loaded_in_8bit = True
    return model


def torchao_int8(dtype: torch.dtype) -> nn.Module:
    """torchao's weight-only int8: plain linears whose weight is a tensor subclass."""
    model = llama(dtype, hidden=64, intermediate=128)
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


def torchao_int4(dtype: torch.dtype) -> nn.Module:
    """The weight-only int4 of torchao that CPUs have (PEFT refuses that of ``Int4WeightOnlyConfig``)."""
    model = llama(dtype, hidden=64, intermediate=128)
    quantize_(model.model.layers, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)))
    return model


def dequantised(model: nn.Module) -> nn.Module:
    """A copy whose torchao or nf4 weights are plain numbers, in the dtype of the model's products."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            weight = child.weight
            if hasattr(weight, "quant_state"):
                numbers = dequantize_4bit(weight.data, weight.quant_state)
            elif hasattr(weight, "dequantize") and type(weight).__module__.startswith("torchao"):
                numbers = weight.dequantize()
            else:
                continue
            plain = nn.Linear(child.in_features, child.out_features, bias=False)
            plain.weight = nn.Parameter(numbers.detach(), requires_grad=False)
            setattr(parent, name, plain)
    return model


def _converted(dtype: torch.dtype, convert) -> nn.Module:
    model = llama(dtype, hidden=64, intermediate=128)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, convert(child))
    return model.eval()


KINDS = {
    "nf4": nf4,
    "nf4-in-bf16": nf4_in_bf16,
    "int8": int8,
    "torchao-int8": torchao_int8,
    "torchao-int4": torchao_int4,
}
