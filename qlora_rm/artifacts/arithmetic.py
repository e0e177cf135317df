"""The device and dtype in which a finished model computes."""

import bitsandbytes as bnb
import torch
from torch import nn

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.backbone.in_force import compute_quantized_layers_in
from qlora_rm.backbone.precision import DTYPES, NAMES, Precision, best_dtype
from qlora_rm.console import say


def lacks_16_bit_units() -> bool:
    """Whether this machine computes 16-bit matrices slower than fp32 ones."""
    return best_dtype()[0] is torch.float32


def compute_dtype(manifest: Manifest | None, precision: Precision = "auto") -> torch.dtype:
    """The dtype to compute in: the one asked for, else the model's own if the machine has units for it."""
    if precision != "auto":
        return DTYPES[precision]
    best, reason = best_dtype()
    if manifest is None:
        return best
    own = DTYPES[manifest.merge.dtype if manifest.merge else manifest.compute_dtype]
    if own is not torch.float32 and lacks_16_bit_units():
        say(f"computing in {reason}; the model was made for {NAMES[own]}, so scores differ by its rounding")
        return torch.float32
    return own


def compute_in_fp32(model: nn.Module) -> None:
    """Widen every unquantized weight to fp32, and compute 4-bit layers in fp32; no weight changes its value."""
    compute_quantized_layers_in(model, torch.float32)
    for parameter in model.parameters():
        packed = isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params))
        if not packed and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def to_accelerator(model: nn.Module) -> nn.Module:
    """Move the model to the GPU if there is one and the model fits; quantized models are already there."""
    if not torch.cuda.is_available() or next(model.parameters()).device.type != "cpu":
        return model
    try:
        return model.cuda()
    except torch.OutOfMemoryError:
        say("the model does not fit on the GPU: computing on the CPU")
        return model.cpu()
