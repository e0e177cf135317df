"""Limits that follow from a backbone's configuration, before any weight is loaded: positions and token ids."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from qlora_rm.backbone.load import skeleton
from qlora_rm.backbone.positions import tables_of


def positions_of_config(config: PretrainedConfig, trust_remote_code: bool = False) -> int | None:
    """Tokens of the longest sequence that such a model has positions for; None where no table limits them.

    The model's own code looks positions up, in tables without memory. Where that fails, the answer is None, and
    `positions.usable_positions` of the loaded model decides.
    """
    try:
        model = _without_memory(config, trust_remote_code)
        return min((table.positions for table in tables_of(model, has_memory=False)), default=None)
    except Exception:  # a model's own code may raise anything; loading the model reports it
        return None


def _without_memory(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Build the model with zero weights that take no memory; its tables of numbers (position_ids) are real."""
    with _RealNumbers():
        model = skeleton(deepcopy(config), trust_remote_code)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_zeros_like(parameter), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = _zeros_like(buffer)
    return model.eval()


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


class _RealNumbers(TorchFunctionMode):
    """Creates integer tensors on the CPU while a model is built on the meta device, which holds no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        integers = kwargs.get("dtype") in (torch.long, torch.int)
        if func is torch.arange or (func in (torch.zeros, torch.ones) and integers):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
