"""Experts in 4 bit: fused expert weights, quantized as they are loaded, and LoRA on them.

transformers 5 holds all experts of a layer in two 3-D parameters, which bitsandbytes' quantizer skips. Here each
becomes one `Params4bit`, byte for byte what `bitsandbytes.functional.quantize_4bit` makes of it. bitsandbytes' own way,
`nn.parametrize`, dequantizes all experts at each use and autograd keeps them: 16 bit during training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import ParamWrapper
from peft.tuners.lora.bnb import dispatch_bnb_4bit, dispatch_bnb_8bit
from peft.tuners.lora.layer import dispatch_default
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_rm.backbone.expert_linear import ONE_BY_ONE, logical_shape, unpacked
from qlora_rm.backbone.precision import BLOCK
from qlora_rm.backbone.saved_quantization import Deserialize4bit, Saved8BitQuantizer

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of the linear layers of an expert outside the fused ones: a shared expert, or a dense layer."""


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module has transformers' common, replaceable form of experts (`use_experts_implementation`)."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def fused_experts(model: nn.Module) -> dict[str, Any]:
    """Name -> module that holds the experts of a layer."""
    return {name: module for name, module in model.named_modules() if is_fused_experts(module)}


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The fused weights of such a module, packed or not."""
    return {name: weight for name, weight in module.named_parameters(recurse=False) if name in WEIGHTS}


def gate_names(model: nn.Module) -> list[str]:
    """Linear layers that weigh experts: routers, and gates of a shared expert.

    They are small, and neither quantized nor adapted. Most architectures hold the router as a parameter of its own
    class, which is left alone anyway.
    """
    names = []
    for name, experts in fused_experts(model).items():
        block = name.rpartition(".")[0]
        for inner, layer in model.get_submodule(block).named_modules():
            weighs = isinstance(layer, nn.Linear) and layer.out_features in (1, experts.num_experts)
            if weighs and inner.rpartition(".")[2] not in PROJECTIONS:
                names.append(f"{block}.{inner}")
    return names


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4-bit quantizer, extended to fused expert weights whose experts are a whole number of blocks.

    A checkpoint that was saved in 4 bit is left as it is: transformers sets its other weights unchanged.
    """

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super()._process_model_before_weight_loading(model, **kwargs)
        experts = fused_experts(model).values()
        if not self.pre_quantized and any(
            _can_pack(weight) for module in experts for weight in expert_weights(module).values()
        ):
            for module in experts:
                module.config._experts_implementation = ONE_BY_ONE
                module.lora = {}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module_name, _, name = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        if self.pre_quantized or not is_fused_experts(module):
            return super().param_needs_quantization(model, param_name, **kwargs)
        return name in WEIGHTS and _can_pack(module.get_parameter(name))

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": Deserialize4bit}


class _Quantize(Bnb4bitQuantize):
    """The operation that the loader calls with each complete weight, in 16 or 32 bit, before it sets it."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        settings = self.hf_quantizer.quantization_config
        result: dict[str, Tensor] = {}
        others = {}
        for name, value in input_dict.items():
            if is_fused_experts(model.get_submodule(name.rpartition(".")[0])):
                weight = value[0] if isinstance(value, list) else value
                result[name] = pack(weight, settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant)
            else:
                others[name] = value
        return result | super().convert(others, model=model, **kwargs)


def pack(weight: Tensor, quant_type: str, double_quant: bool) -> Params4bit:
    """Pack all experts' weights [E, ., .] into one parameter of bytes, uint8 [E . . / 2, 1], and a quantization state.

    Bytes and state equal those that `quantize_4bit` gives for the complete weight. This packs one expert at a time,
    since bitsandbytes' CPU kernel needs 14 bytes a weight while it runs (0.50, measured).
    """
    parts = [quantize_4bit(expert, blocksize=BLOCK, quant_type=quant_type) for expert in weight]
    state = parts[0][1]
    state.shape, state.absmax = weight.shape, torch.cat([part.absmax for _, part in parts])
    if double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return Params4bit(
        torch.cat([packed for packed, _ in parts]),
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=double_quant,
        quant_type=quant_type,
        bnb_quantized=True,
    )


def _can_pack(weight: nn.Parameter) -> bool:
    """Whether no block straddles two experts."""
    return weight.dim() == 3 and weight[0].numel() % BLOCK == 0


@contextmanager
def quantized_experts() -> Iterator[None]:
    """Let `from_pretrained` with `load_in_4bit` quantize fused expert weights too.

    It also reads checkpoints saved in 4 or 8 bit in the requested dtype. Remove once transformers' bitsandbytes
    quantizer does (5.23 skips every parameter outside a linear layer).
    """
    ours = {"bitsandbytes_4bit": ExpertsQuantizer, "bitsandbytes_8bit": Saved8BitQuantizer}
    stock = {name: AUTO_QUANTIZER_MAPPING[name] for name in ours}
    AUTO_QUANTIZER_MAPPING.update(ours)
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(stock)


def unpack_experts(model: PreTrainedModel) -> None:
    """Give the model plain fp32 expert weights on the CPU and transformers' own implementation of experts, in place."""
    for experts in fused_experts(model).values():
        for name, weight in expert_weights(experts).items():
            if isinstance(weight, Params4bit):
                setattr(experts, name, nn.Parameter(unpacked(weight), requires_grad=False))
        if experts.config._experts_implementation == ONE_BY_ONE:
            experts.config._experts_implementation = model.get_correct_experts_implementation(None)


class ExpertsLora(ParamWrapper):
    """PEFT's LoRA of a fused expert weight, for one-by-one experts: same names, shapes, initialization and files.

    PEFT's own class adds B A to the full weight in every forward pass. Here the experts module holds the factors during
    its forward pass, and applies them to the rows of each expert.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, first, second = logical_shape(self.get_param())
        self._param_ndim = 3
        return first, second

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        experts: Any = self.get_base_layer()
        for adapter in active_adapters:
            if adapter in self.lora_A:
                assert self.parameter_name not in experts.lora, "one adapter at a time"
                factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
                experts.lora[self.parameter_name] = factors
        try:
            yield
        finally:
            experts.lora.pop(self.parameter_name, None)


# PEFT recognizes wrappers of parameters by this name, and wraps one in another for a module's second parameter
ExpertsLora.__name__ = "ParamWrapper"


def lora_modules(model: nn.Module) -> dict[type[nn.Module], Callable[..., nn.Module | None]]:
    """Factories of LoRA layers for targeted parameters, by type of the module that holds them (PEFT's custom modules).

    One-by-one experts get `ExpertsLora`. A linear layer whose weight is targeted gets the LoRA layer that its own name
    would give it. PEFT would add B A to its weight, which may be packed.
    """
    experts = {
        type(module) for module in fused_experts(model).values() if module.config._experts_implementation == ONE_BY_ONE
    }
    return {**dict.fromkeys(experts, ExpertsLora), nn.Linear: _lora_of_linear}


def _lora_of_linear(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
    if kwargs.pop("parameter_name", None) is None:
        return None  # targeted by its own name: leave it to PEFT
    for dispatch in (dispatch_bnb_8bit, dispatch_bnb_4bit, dispatch_default):
        layer = dispatch(target, adapter_name, **kwargs)
        if layer is not None:
            return layer
    return None
