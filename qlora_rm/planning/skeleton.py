"""A backbone without its weights: the modules that loading would make, quantized and adapted, on the meta device.

Counting them is exact for every architecture the libraries support, where a formula would cover only some.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.experts import gate_names
from qlora_rm.backbone.head import compute_in_own_precision, head_modules, is_in_head
from qlora_rm.backbone.in_force import disable_dropout
from qlora_rm.backbone.load import Backbone, quantization_config, skeleton
from qlora_rm.backbone.packed import PrefixSharing
from qlora_rm.backbone.precision import BLOCK, NESTED_BLOCK
from qlora_rm.backbone.reach import freeze_unreached
from qlora_rm.config import AdapterConfig, BackboneConfig

CODE_BYTES = (16 + 256) * 4
"""The two code books that every quantized tensor carries, fp32."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model at rest, unsharded.

    Attributes:
        packed: 4- or 8-bit weights, including the experts'.
        scales: their quantization constants. ZeRO shards only parameters, and these are none: every rank keeps them
            all.
        plain: frozen unquantized weights: embeddings, norms, biases.
        trained: adapter and head (or the full model), fp32.
        largest: the most that ZeRO-3 shards and that is in use at one time: the packed weights of a layer, or the
            embedding.
        parameters: number of weights, however they are packed.
        trainable: number of those that are trained.
        active: number of those a token is multiplied with; of a mixture's experts, the ones it is routed to.
        dense: bytes of the largest matrix once dequantized to the compute dtype.
    """

    packed: int
    scales: int
    plain: int
    trained: int
    largest: int
    parameters: int
    trainable: int
    active: int
    dense: int

    @property
    def total(self) -> int:
        """Bytes of a complete copy."""
        return self.packed + self.scales + self.plain + self.trained


def build(
    config: PretrainedConfig,
    backbone: BackboneConfig,
    adapter: AdapterConfig,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """Build the model that `load_backbone` and `attach_adapter` would make of `config`, without any storage.

    Raises:
        UserError: the adapter names layers that do not exist.
    """
    whole = not adapter.use_lora
    model: Any = skeleton(config, trust_remote_code, torch.float32 if whole else dtype)
    head = head_modules(model)
    freeze_unreached(model)  # while its layers are plain, which run on the meta device
    for name in head:
        compute_in_own_precision(model.get_submodule(name).to(torch.float32))
    disable_dropout(model)  # as the train command does, before LoRA adds its own
    if isinstance(getattr(model, "score", None), nn.Linear):  # takes forests, as far as is known without a probe
        cls = type(model)
        model.__class__ = type(cls.__name__, (PrefixSharing, cls), {})
    model.config.use_cache = False
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = 0
    quantization = quantization_config(backbone.quantization, dtype)
    if quantization is not None:
        replace_with_bnb_linear(model, head + gate_names(model), quantization)
        model.is_quantized = True
        model.is_loaded_in_4bit = backbone.quantization == "4bit"
        model.is_loaded_in_8bit = backbone.quantization == "8bit"
    return attach_adapter(Backbone(model, head, True), adapter) if adapter.use_lora else model


def weigh(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Weights:
    """Count a skeleton; `dtype` is the compute dtype that packed weights are dequantized to."""
    inner = backbone_of(model)
    head, quantized = head_modules(inner), bool(getattr(inner, "is_quantized", False))
    text = inner.config.get_text_config()
    packed = scales = plain = trained = parameters = trainable = idle = dense = 0
    layers: dict[str, int] = {}
    for module, name, parameter in weights_of(model):
        n, experts = parameter.numel(), is_experts(parameter)
        parameters += n
        if parameter.requires_grad:
            trained, trainable = trained + parameter.nbytes, trainable + n
            continue
        if quantized and (experts or isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params))):
            stored, constants = quantized_bytes(parameter, experts)
            packed, scales = packed + stored, scales + constants
        else:
            stored = parameter.nbytes
            plain += stored
        if parameter.dim() >= 2 and not isinstance(module, nn.Embedding) and not is_in_head(name, head):
            dense = max(dense, n // (parameter.shape[0] if experts else 1) * dtype.itemsize)
        if experts:
            idle += n - n * min(experts_per_token(text), parameter.shape[0]) // parameter.shape[0]
        unit = name.rpartition(".")[0] if isinstance(module, nn.Embedding) else layer_of(name)
        layers[unit] = layers.get(unit, 0) + stored
    largest = max(layers.values(), default=0)
    return Weights(packed, scales, plain, trained, largest, parameters, trainable, parameters - idle, dense)


def quantized_bytes(parameter: torch.Tensor, experts: bool = False) -> tuple[int, int]:
    """Bytes of a matrix (or of fused experts) once quantized, and of its constants, as bitsandbytes stores them.

    4 bit: two weights a byte; a uint8 scale for every 64 weights, an fp32 one for every 256 scales, two code books.
    8 bit: a byte a weight; an fp32 scale for every row.
    """
    n = parameter.numel()
    if isinstance(parameter, bnb.nn.Int8Params) and not experts:
        return n, parameter.shape[0] * 4
    scales = -(-n // BLOCK)
    return -(-n // 2), scales + -(-scales // NESTED_BLOCK) * 4 + CODE_BYTES


def weights_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every parameter once, with the module that owns it and its name without PEFT's wrapping."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, f"{path}.{name}".removeprefix("base_model.model.").replace(".base_layer", ""), parameter


def is_experts(parameter: torch.Tensor) -> bool:
    """Whether this is one weight for all experts of a layer, [experts, out, in]."""
    return parameter.dim() == 3


def experts_per_token(config: PretrainedConfig) -> int:
    """Number of experts that a mixture routes each token to."""
    return int(getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1)


def layer_of(name: str) -> str:
    """The transformer layer a parameter belongs to: its name up to the first number."""
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: numbered + 1])


def backbone_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The sequence-classification model inside PEFT's wrapper."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))
