"""A reward model without its weights: their names, the dtype each is loaded in, and which are quantized."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform, build_glob_alternation
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import AutoHfQuantizer

from qlora_rm.backbone.experts import gate_names, quantized_experts
from qlora_rm.backbone.head import head_modules
from qlora_rm.backbone.load import quantization_config, skeleton
from qlora_rm.config import Quantization


@dataclass(frozen=True)
class Skeleton:
    """The result of loading a backbone for training, found without reading a weight.

    Attributes:
        model: on the meta device, in fp32, with one label and plain layers.
        dtypes: of each parameter and persistent buffer as training loads it, before quantization.
        quantized: names of the parameters that training quantizes as it loads them.
        conversions: transformers' own, from names and layouts on disk to those of the model.
    """

    model: PreTrainedModel
    dtypes: dict[str, torch.dtype]
    quantized: frozenset[str]
    conversions: list[WeightTransform]

    @classmethod
    def of(cls, config: PretrainedConfig, quantization: Quantization, dtype: torch.dtype) -> "Skeleton":
        """Apply the library's own rules: its quantizer replaces layers in a second skeleton, which gives the answers.

        Arguments:
            config: of a backbone of any kind; one saved in 4 bit keeps its own quantization.
        """
        assert not is_deepspeed_zero3_enabled(), "transformers would shard the skeleton"
        plain, loaded = (skeleton(config, dtype=wanted) for wanted in (torch.float32, dtype))
        stored = getattr(config, "quantization_config", None)
        settings = stored or quantization_config(quantization, dtype)
        quantizer = None
        if settings is not None:
            if stored is None:
                settings.llm_int8_skip_modules = head_modules(plain) + gate_names(plain)
            with quantized_experts():
                quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=stored is not None)
            quantizer.preprocess_model(model=loaded, dtype=dtype, device_map={"": "cpu"})
        names = plain.state_dict()
        kept = loaded._get_dtype_plan(dtype)
        pattern, groups, _ = build_glob_alternation(list(kept)) if kept else (None, {}, None)

        def loaded_dtype(name: str, tensor: Tensor) -> torch.dtype:
            match = pattern.search(name) if pattern is not None else None
            if match is not None and match.lastgroup is not None:
                return kept[groups[match.lastgroup]]
            return dtype if tensor.is_floating_point() else tensor.dtype

        def is_quantized(name: str) -> bool:
            return quantizer is not None and stored is None and quantizer.param_needs_quantization(loaded, name)

        return cls(
            model=plain,
            dtypes={name: loaded_dtype(name, tensor) for name, tensor in names.items()},
            quantized=frozenset(name for name, _ in plain.named_parameters() if is_quantized(name)),
            conversions=get_model_conversion_mapping(loaded, None, quantizer),
        )
