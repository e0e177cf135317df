"""The count without weights equals the count of the real model, to the byte."""

from dataclasses import dataclass

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel

from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.inventory import stored_bytes
from qlora_rm.backbone.load import load_backbone, read_model_config
from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.planning.published_shapes import PUBLISHED, published
from qlora_rm.planning.skeleton import build, weigh
from tests.models_for_tests import CAUSAL, ENCODERS, save_backbone
from tests.tokenizers_for_tests import small_tokenizer

ADAPTER = AdapterConfig(lora_r=8)


@dataclass(frozen=True)
class Real:
    """Bytes of a loaded and adapted model, with each part as the inventory counts it."""

    quantized: int
    plain: int
    trained: int
    moments: int


def load(folder: str, quantization: str) -> PeftModel:
    config = BackboneConfig(model_name_or_path=folder, quantization=quantization, share_prefix="false")  # type: ignore[arg-type]
    return attach_adapter(load_backbone(config, load_tokenizer(folder), torch.float32), ADAPTER)


def count(model: PeftModel) -> Real:
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    quantized = [p for p in frozen if isinstance(p, (bnb.nn.Params4bit, bnb.nn.Int8Params))]
    scales = sum(p.SCB.nbytes for p in quantized if isinstance(p, bnb.nn.Int8Params))
    plain = sum(stored_bytes(p) for p in frozen) - sum(stored_bytes(p) for p in quantized)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(s.nbytes for state in optimizer.state.values() for name, s in state.items() if name != "step")
    return Real(sum(map(stored_bytes, quantized)) + scales, plain, sum(p.nbytes for p in trained), moments)


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [*((a, "4bit") for a in (*CAUSAL, *ENCODERS, "mixtral", "qwen3_moe")), ("llama", "8bit")],
)
def test_bytes_are_those_of_the_loaded_model(architecture: str, quantization: str, tmp_path) -> None:
    folder = save_backbone(tmp_path, architecture, small_tokenizer(), rows=640)
    real = count(load(folder, quantization))
    backbone = BackboneConfig(quantization=quantization)  # type: ignore[arg-type]
    weights = weigh(build(read_model_config(folder), backbone, ADAPTER, torch.float32), torch.float32)
    assert weights.packed + weights.scales == real.quantized
    assert weights.plain == real.plain
    assert weights.trained == real.trained
    assert 8 * weights.trainable == real.moments


@pytest.mark.slow
@pytest.mark.parametrize(("size", "billions", "active"), [("70B", 70.55 - 1.05, 69.5), ("8x7B", 46.70 - 0.13, 12.75)])
def test_published_shapes_have_the_size_they_are_known_by(size: str, billions: float, active: float) -> None:
    """Without the output embedding, which a reward model does not need."""
    weights = weigh(build(published(size), BackboneConfig(), AdapterConfig(), torch.bfloat16), torch.bfloat16)
    frozen = (weights.parameters - weights.trainable) / 1e9
    assert frozen == pytest.approx(billions, abs=0.02)
    assert (weights.active - weights.trainable) / 1e9 == pytest.approx(active, abs=0.02)
    assert weights.packed == pytest.approx(weights.parameters / 2, rel=0.02)


@pytest.mark.slow
def test_experts_count_as_quantized() -> None:
    config = published("30B-A3B")
    whole = weigh(build(config, BackboneConfig(quantization="none"), AdapterConfig(), torch.bfloat16), torch.bfloat16)
    packed = weigh(build(config, BackboneConfig(), AdapterConfig(), torch.bfloat16), torch.bfloat16)
    experts = 48 * 128 * 3 * 2048 * 768
    assert experts / 2 < packed.packed < experts / 2 * 1.1
    assert (whole.plain - packed.plain) == 4 * packed.packed
    assert packed.scales / packed.packed == pytest.approx(2 * (1 / 64 + 4 / (64 * 256)), rel=0.01)


def test_every_published_shape_is_read() -> None:
    assert {name: published(name.lower()).model_type for name in PUBLISHED}
