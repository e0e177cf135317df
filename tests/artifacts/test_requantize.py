"""A merged model quantized to 4 bit again: stock transformers loads it, and its manifest records the change."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.config import AdapterConfig
from qlora_rm.errors import UserError
from qlora_rm.exporting.export import export
from qlora_rm.exporting.requantize import requantize
from qlora_rm.merging.merge import merge
from qlora_rm.verification.folder import verify
from tests.reward_models_for_tests import llama_adapter, make_reward_model


@pytest.mark.slow
def test_quantizes_all_but_the_head_and_counts_flips(tmp_path: Path) -> None:
    merge(str(llama_adapter()), str(tmp_path / "merged"), dtype="fp32")
    result = requantize(str(tmp_path / "merged"), str(tmp_path / "small"), yours=[[[5, 6, 7], [5, 6, 8], [9]]])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert type(linear.pop("score")) is torch.nn.Linear
    assert linear and all(isinstance(m, bnb.nn.Linear4bit) for m in linear.values())
    assert model.score.weight.dtype == torch.float32
    manifest = Manifest.load(tmp_path / "small")
    step = manifest.history[-1]
    assert (step.name, step.drift, step.flips) == ("requantize", result.golden.largest, result.golden.flips)
    assert result.golden.largest > 0
    assert result.yours is not None and result.yours.pairs == 3
    assert step.settings["flips_on_your_pairs"] == f"{result.yours.flips} of 3"
    assert [check for check in verify(str(tmp_path / "small")) if not check.ok] == []
    with pytest.raises(UserError, match="in 4 bit already"):
        requantize(str(tmp_path / "small"), str(tmp_path / "again"))


def test_an_adapter_is_merged_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Merge it first"):
        requantize(str(llama_adapter()), str(tmp_path / "small"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    """Stock transformers would load its experts in 16 bit although the model claims 4 bit."""
    folder = make_reward_model(tmp_path, "mixtral", adapter=AdapterConfig(lora_r=4))
    merge(str(folder), str(tmp_path / "merged"), dtype="fp32")
    with pytest.raises(UserError, match="keeps in 16 bit"):
        requantize(str(tmp_path / "merged"), str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_engines_get_no_4_bit_folder(tmp_path: Path) -> None:
    merge(str(llama_adapter()), str(tmp_path / "merged"), dtype="fp32")
    requantize(str(tmp_path / "merged"), str(tmp_path / "small"))
    with pytest.raises(UserError, match="in 4 bit, which vllm is not known to read"):
        export(str(tmp_path / "small"), ["transformers", "vllm"], str(tmp_path / "out"))
    exported = export(str(tmp_path / "small"), ["transformers"], str(tmp_path / "out"))
    assert exported.ok, [check for check in exported.checks if not check.ok]
    assert "Quantized again to nf4" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
