"""Compare scores and gradients of forests with those of padded batches, for each architecture, dtype and kernel."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from benchmarks.gpu.models import VOCABULARY, checkpoint, configs, size_of, tokenizer
from benchmarks.gpu.passes import (
    EXACT,
    TIMES,
    Pass,
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
from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.packed import forest_batch, row_multiple, sharing_model
from qlora_rm.backbone.scoring import pad_batch
from qlora_rm.config import AdapterConfig, BackboneConfig

FLEX_IN_FP32 = ("llama", "mistral", "gpt_oss")
"""Architectures whose fp32 pass also runs with FlexAttention. In bf16 all do. Each kernel takes seconds to compile."""


def packed(setting: Setting, finding: Finding) -> None:
    """Compare a forest of three prompts with the same sequences right-padded, on 4-bit backbones with adapters."""
    finding.tolerance = (
        f"relative L2 distance; fp32: packed to plain, scores {EXACT['scores']:g}, gradients {EXACT['gradients']:g}; bf16: "
        f"packed bf16 to plain fp32, {TIMES:g} times the measured distance of plain bf16 to plain fp32"
    )
    if not setting.on_gpu:
        finding.result["flex_attention"] = "not tried: it has no backward pass on a CPU"
    for architecture in configs(size_of(setting)):
        finding.result[architecture] = result = {}
        exact = _in_fp32(setting, finding, architecture, result)
        _in_bf16(setting, finding, architecture, result, exact)


def _in_fp32(setting: Setting, finding: Finding, architecture: str, result: dict[str, Any]) -> Pass:
    """Compare packed passes with the plain pass, and return the plain pass."""
    adapted = Adapted.load(setting, architecture, torch.float32, flex=architecture in FLEX_IN_FP32)
    plain = adapted.plain()
    result["fp32"] = {}
    for kernel in adapted.kernels:
        result["fp32"][kernel] = found = apart(adapted.packed(kernel), plain)
        finding.require(within(found, EXACT), f"{architecture}, fp32, {kernel}: {found}, allowed {EXACT}")
    return plain


def _in_bf16(setting: Setting, finding: Finding, architecture: str, result: dict[str, Any], exact: Pass) -> None:
    """Compare packed passes with the plain pass in fp32."""
    adapted = Adapted.load(setting, architecture, torch.bfloat16, flex=True)
    plain = adapted.plain()
    noise = apart(plain, exact)
    allowed = measured_tolerance(noise)
    result["bf16"] = {"plain to plain fp32": noise, "allowed": allowed}
    for kernel in adapted.kernels:
        forest = adapted.packed(kernel)
        found = apart(forest, exact)
        result["bf16"][kernel] = {"to plain fp32": found, "to plain bf16": apart(forest, plain)}
        finding.require(within(found, allowed), f"{architecture}, bf16, {kernel}: {found}, allowed {allowed}")


@dataclass(frozen=True)
class Adapted:
    """A 4-bit backbone with a random adapter that takes forests, as `share_prefixes` decides.

    Attributes:
        kernels: attention kernels to compare, the chosen one first.
        dense: the kernel of plain passes.
    """

    model: PeftModel
    sequences: list[list[int]]
    pad: int
    dtype: torch.dtype
    kernels: list[str]
    dense: str

    @classmethod
    def load(cls, setting: Setting, architecture: str, dtype: torch.dtype, *, flex: bool) -> "Adapted":
        """Load the backbone and attach the adapter. Without `flex`, request the dense kernel, as a user may."""
        free()
        dense = "eager" if architecture == "gpt_oss" else "sdpa"  # SDPA does not support attention sinks
        config = BackboneConfig(
            model_name_or_path=checkpoint(setting, architecture),
            share_prefix="true",
            attn_implementation=None if flex else dense,
        )
        torch.manual_seed(0)
        words = tokenizer(setting)
        model = attach_adapter(load_backbone(config, words, dtype), AdapterConfig(lora_r=4, lora_alpha=8))
        randomize(model)
        kernels = dict.fromkeys([str(_inner(model).config._attn_implementation), dense])
        if not setting.on_gpu:
            kernels["eager"] = None  # the other dense kernel replaces FlexAttention
        ids = sequences(size_of(setting).prompt, VOCABULARY)
        return cls(model, ids, words.pad_token_id, dtype, list(kernels), dense)

    def plain(self) -> Pass:
        _inner(self.model).set_attn_implementation(self.dense)
        return one_pass(self.model, pad_batch(self.sequences, self.pad), self.dtype)

    def packed(self, kernel: str) -> Pass:
        inner = _inner(self.model)
        inner.set_attn_implementation(kernel)
        return one_pass(self.model, forest_batch(self.sequences, self.pad, row_multiple(inner)), self.dtype)


def _inner(model: PeftModel) -> PreTrainedModel:
    inner = sharing_model(model)
    assert inner is not None, "asked for by share_prefix"
    return inner
