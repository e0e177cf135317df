"""The compute dtype, chosen by what the machine multiplies fast, and the block sizes of NF4."""

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]
DtypeName = Literal["bf16", "fp16", "fp32"]
NAMES: dict[torch.dtype, DtypeName] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}

BLOCK, NESTED_BLOCK = 64, 256
"""NF4 as bitsandbytes loads it: a scale for 64 weights, stored in 8 bit with a scale for 256 of them.

Source: Dettmers et al. 2023, "QLoRA", section 3.
"""


def best_dtype() -> tuple[torch.dtype, str]:
    """The dtype this machine computes in by default, and the reason in words.

    Every CPU gets fp32: bf16 is many times slower without AMX tiles (5x forward, 40x backward measured). A default that
    depended on the CPU would give other scores on another machine. `--bf16 true` asks for bf16.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"bf16: {name} has bf16 units"
        return torch.float16, f"fp16: {name} has no bf16 units"
    return torch.float32, "fp32: the default on CPUs"
