"""Merge a model loaded in full, in fp32, where it cannot be merged weight by weight."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.backbone.adapter import load_adapter
from qlora_rm.backbone.experts import unpack_experts
from qlora_rm.backbone.head import head_modules
from qlora_rm.backbone.load import Backbone
from qlora_rm.errors import UserError
from qlora_rm.merging.stream import as_scalar, require_room


def merge_in_memory(adapted: RewardModel, adapter: str, output: Path, dtype: torch.dtype) -> None:
    """Merge the loaded model with the adapter in its folder and save it in `dtype`. `adapted` is unusable afterwards."""
    peft = adapted.model
    assert isinstance(peft, PeftModel)
    base: PreTrainedModel = peft.unload()
    dequantize(base)
    again = load_adapter(Backbone(base, head_modules(base), has_new_head=False), adapter, trainable=False)
    try:
        model = again.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"The adapter {adapter} cannot be merged: {error}") from error
    nn.Module.to(model, dtype=dtype)
    require_room(output, sum(p.numel() * p.element_size() for p in model.parameters()))
    as_scalar(model.config, adapted.tokenizer.pad_token_id)
    model.save_pretrained(output)


def dequantize(model: PreTrainedModel) -> None:
    """Replace the layers of a quantized model by plain fp32 layers on the CPU, in place, layer by layer.

    Unlike `PreTrainedModel.dequantize` (transformers 5.23) it needs no GPU memory, and it restores GPT-2's Conv1D layers,
    whose weights would otherwise be saved transposed.
    """
    quantizer: HfQuantizer | None = getattr(model, "hf_quantizer", None)
    for name, module in list(model.named_modules()):
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            model.set_submodule(name, _plain_layer(module))
    unpack_experts(model)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        # Saving asks each conversion for its reverse; that of stored 4-bit weights has none (transformers 5.23).
        conversions: Any = model._weight_conversions
        model._weight_conversions = [c for c in conversions if not _reads_4_bit(c)]  # type: ignore[assignment]
    nn.Module.to(model, device="cpu", dtype=torch.float32)


def _reads_4_bit(conversion: WeightTransform) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        isinstance(o, Bnb4bitDeserialize) for o in conversion.operations
    )


def _plain_layer(module: Any) -> nn.Module:
    weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).float().cpu()
    rows, columns = weight.shape
    is_conv = getattr(module, "source_cls", None) is Conv1D
    with torch.device("meta"):
        plain: Any = Conv1D(rows, columns) if is_conv else nn.Linear(columns, rows, bias=module.bias is not None)
    plain.weight = nn.Parameter(weight.T.contiguous() if is_conv else weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().float().cpu(), requires_grad=False)
    return plain
