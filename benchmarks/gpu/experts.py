"""Compare fused 4-bit experts with the same weights dequantized, which transformers' and PEFT's own code computes."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from benchmarks.gpu.models import VOCABULARY, checkpoint, size_of, tokenizer
from benchmarks.gpu.passes import (
    EXACT,
    TIMES,
    apart,
    free,
    measured_tolerance,
    one_pass,
    randomize,
    sequences,
    within,
)
from benchmarks.gpu.suite import Finding, Setting
from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.load import Backbone, load_backbone
from qlora_rm.backbone.scoring import pad_batch
from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.merging.in_memory import dequantize

ARCHITECTURES = ("mixtral", "gpt_oss")
"""Experts stored [out, in] without biases, and [in, out] with them."""


def experts(setting: Setting, finding: Finding) -> None:
    """Compare scores and gradients, including adapters on the experts."""
    finding.tolerance = (
        f"relative L2 distance; fp32: scores {EXACT['scores']:g}, gradients {EXACT['gradients']:g}; bf16: 4-bit bf16 to "
        f"dequantized fp32, {TIMES:g} times the measured distance of dequantized bf16 to dequantized fp32"
    )
    pad = tokenizer(setting).pad_token_id
    batch = pad_batch(sequences(size_of(setting).prompt, VOCABULARY), pad)
    for architecture in ARCHITECTURES:
        free()
        model = attach_adapter(
            _backbone(setting, architecture, torch.float32), AdapterConfig(lora_r=4, lora_alpha=8, lora_experts=True)
        )
        randomize(model)
        folder = setting.scratch / f"experts_{architecture}"
        model.save_pretrained(folder)
        packed = one_pass(model, batch, torch.float32)
        plain = dequantized(setting, architecture, folder)
        exact, noisy = (one_pass(plain, batch, dtype) for dtype in (torch.float32, torch.bfloat16))
        found, rounded = apart(packed, exact), apart(one_pass(model, batch, torch.bfloat16), exact)
        allowed = measured_tolerance(apart(noisy, exact))
        finding.result[architecture] = {
            "fp32": found,
            "bf16": {"to dequantized fp32": rounded, "allowed": allowed},
        }
        finding.require(within(found, EXACT), f"{architecture}, fp32: {found}, allowed {EXACT}")
        finding.require(within(rounded, allowed), f"{architecture}, bf16: {rounded}, allowed {allowed}")


def _backbone(setting: Setting, architecture: str, dtype: torch.dtype) -> Backbone:
    config = BackboneConfig(model_name_or_path=checkpoint(setting, architecture), share_prefix="false")
    return load_backbone(config, tokenizer(setting), dtype)


def dequantized(setting: Setting, architecture: str, folder: Path) -> nn.Module:
    """Return the backbone with plain fp32 weights of the same values on the device, with the adapter of `folder` as PEFT
    attaches it."""
    base = _backbone(setting, architecture, torch.float32).model
    dequantize(base)
    nn.Module.to(base, setting.device)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=True)
