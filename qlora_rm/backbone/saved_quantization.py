"""Settings in a checkpoint's config.json, compared with what the run asks for."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from qlora_rm.backbone.precision import NAMES
from qlora_rm.config import Quantization
from qlora_rm.errors import UserError

OURS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"}
"""How `--quantization 4bit` quantizes; a checkpoint may have been saved with other settings."""

IN_THE_WAY = {
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
"""Overrides of config.json settings that only cost memory here, or change what a forward pass returns."""


def saved_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The checkpoint's quantization settings; empty where it is not quantized."""
    saved = getattr(config, "quantization_config", None) or {}
    return saved if isinstance(saved, dict) else saved.to_dict()


def saved_quantization(config: PretrainedConfig) -> str:
    """What the checkpoint is saved in: "none", "4bit", "8bit", or the name of another method (gptq, fp8, ...)."""
    saved = saved_settings(config)
    if not saved:
        return "none"
    if saved.get("load_in_4bit"):
        return "4bit"
    return "8bit" if saved.get("load_in_8bit") else str(saved.get("quant_method"))


def require_obeyable(name: str, config: PretrainedConfig, asked: Quantization) -> None:
    """Refuse a `--quantization` that a quantized checkpoint cannot be loaded in.

    Raises:
        UserError: the checkpoint is saved in another quantization than the one asked for.
    """
    saved = saved_quantization(config)
    if saved in ("none", asked):
        return
    way_out = f"pass --quantization {saved}, or use" if saved in ("4bit", "8bit") else "use"
    raise UserError(
        f"{name} is saved in {_in_words(saved)}, from which --quantization {asked} cannot be made: {way_out} a copy of it in "
        "16 bit."
    )


def _in_words(saved: str) -> str:
    return {"4bit": "4 bit", "8bit": "8 bit"}.get(saved, saved)


def kept_settings(config: PretrainedConfig) -> str | None:
    """Quantization settings of a 4-bit checkpoint that differ from this project's and cannot be changed, in words."""
    saved = saved_settings(config)
    if not saved.get("load_in_4bit"):
        return None
    # bitsandbytes' defaults, for settings that an old config.json lacks
    found = {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
    } | saved
    words = []
    if found["bnb_4bit_quant_type"] != OURS["bnb_4bit_quant_type"]:
        words.append(f"{found['bnb_4bit_quant_type']} instead of nf4")
    if not found["bnb_4bit_use_double_quant"]:
        words.append("no double quantization")
    storage = str(found["bnb_4bit_quant_storage"]).removeprefix("torch.")
    if storage != OURS["bnb_4bit_quant_storage"]:
        words.append(f"bytes stored as {storage}")
    return ", ".join(words) or None


def config_of_run(config: PretrainedConfig, dtype: torch.dtype, plain: list[str]) -> PretrainedConfig:
    """A copy of a checkpoint's config for one label, with the run's settings in place of the checkpoint's.

    Arguments:
        dtype: compute dtype of 4-bit layers.
        plain: modules of a quantized checkpoint that must not become quantized layers: the head, gates of experts.
    """
    config = deepcopy(config)
    config.num_labels = 1
    config.problem_type = "regression"
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in IN_THE_WAY.items():
            if hasattr(part, name):
                setattr(part, name, value)
    saved = saved_settings(config)
    if saved.get("load_in_4bit") or saved.get("load_in_8bit"):
        # with None, transformers would skip its usual heads (`lm_head`, tied weights), which are not this one
        skipped = [*(saved.get("llm_int8_skip_modules") or []), *plain]
        config.quantization_config = saved | {
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "llm_int8_skip_modules": skipped,
        }
    return config


def _in_dtype_of_model(read: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any) -> dict[str, Any]:
    """Cast a weight that was read to the model's dtype where it is not quantized.

    transformers 5.23 converts the weights of norms and embeddings like packed ones, and leaves them in their stored
    dtype, whatever `dtype` says (transformers #47378). Remove once it casts them.
    """
    if len(read) != 1 or not getattr(model, "is_quantized", False):
        return read
    key, value = next(iter(read.items()))
    tensor = value[0] if isinstance(value, list) else value
    wanted = model.get_parameter_or_buffer(full_layer_name)
    if type(wanted) in (nn.Parameter, Tensor) and tensor.is_floating_point() and wanted.is_floating_point():
        return {key: tensor.to(wanted.dtype)}
    return read


class Deserialize4bit(Bnb4bitDeserialize):
    """Reads a checkpoint saved in 4 bit; unquantized weights get the dtype asked for."""

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _in_dtype_of_model(super().convert(*args, **kwargs), **kwargs)


class Deserialize8bit(Bnb8bitDeserialize):
    """Reads a checkpoint saved in 8 bit; unquantized weights get the dtype asked for."""

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _in_dtype_of_model(super().convert(*args, **kwargs), **kwargs)


class Saved8BitQuantizer(Bnb8BitHfQuantizer):
    """bitsandbytes' 8-bit quantizer, whose unquantized weights get the dtype asked for."""

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Deserialize8bit}


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name in options: fp32, bf16, fp16; otherwise torch's name."""
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))
