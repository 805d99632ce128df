"""Tiny models whose linears are quantised by bitsandbytes or torchao, the same weights at every call."""

from __future__ import annotations

import bitsandbytes
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from tests.models import llama


def nf4(dtype: torch.dtype) -> nn.Module:
    """4-bit normal floats, as QLoRA's."""

    def convert(linear: nn.Linear) -> nn.Module:
        made = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
        )
        made.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return made.to("cpu")

    model = _converted(dtype, convert)
    model.is_loaded_in_4bit = True
    return model


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
    model = llama(dtype, hidden=64)
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


def _converted(dtype: torch.dtype, convert) -> nn.Module:
    model = llama(dtype, hidden=64)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, convert(child))
    return model.eval()


KINDS = {"nf4": nf4, "int8": int8, "torchao-int8": torchao_int8}
