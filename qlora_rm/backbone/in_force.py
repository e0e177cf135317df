"""The settings a loaded model actually computes with, read from its layers."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_rm.backbone.saved_quantization import name_of


def compute_quantized_layers_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Set the compute dtype of every 4-bit layer, and keep it there.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a layer's weights at its first forward in eval mode. From then
    on the layer computes in bf16 whatever the compute dtype, and passes no gradient back in training mode. Remove once
    it does not.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.support_avx512bf16_for_cpu = False


def dequantize_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Dequantize 4-bit weights to `dtype`, in which their layers compute, instead of the dtype they were saved from."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype


def disable_dropout(model: nn.Module) -> None:
    """Switch off all dropout: layers, and probabilities that a module passes to its attention kernel or to a function.

    TRL's `disable_dropout_in_model` changes `nn.Dropout` layers only; Llama and most others hold `attention_dropout` as
    a number. Remove once TRL changes those too.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def settings_in_force(model: nn.Module) -> Iterator[str]:
    """Yield lines: quantized layers with their storage and compute dtype, and the attention kernel."""
    inside = {id(m.weight) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    layers = Counter(_layer(module) for module in model.modules())
    layers.update(
        f"expert weights ({_packing(parameter)}), computed in the dtype of their input"
        for parameter in model.parameters()
        if isinstance(parameter, bnb.nn.Params4bit) and id(parameter) not in inside
    )
    for words, count in layers.items():
        if words:
            yield f"quantized: {count} {words}"
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is not None:
        yield f"attention kernel: {inner.config.get_text_config()._attn_implementation}"


def _layer(module: nn.Module) -> str:
    if isinstance(module, bnb.nn.Linear4bit):
        dtype = "the dtype of their input" if module.compute_dtype is None else name_of(module.compute_dtype)
        return f"layers ({_packing(module.weight)}), computed in {dtype}"
    if isinstance(module, bnb.nn.Linear8bitLt):
        return f"layers (int8, outliers above {module.state.threshold:g} in 16 bit)"
    return ""


def _packing(weight: Any) -> str:
    state = weight.quant_state
    kind, nested = (state.quant_type, state.nested) if state else (weight.quant_type, weight.compress_statistics)
    storage = str(weight.dtype).removeprefix("torch.")
    return f"{kind}, {'double' if nested else 'single'} quantization, stored as {storage}"
