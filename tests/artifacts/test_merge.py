"""A merged model gives the adapter's scores to any consumer, or is not written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from qlora_rm.artifacts.golden import ROUNDED
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest
from qlora_rm.artifacts.safetensors_writer import Shards
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.errors import UserError
from qlora_rm.merging import merge as merging
from qlora_rm.merging import stream as streaming
from qlora_rm.merging.merge import merge
from qlora_rm.verification.folder import verify
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import copy_of, edit_json, llama_adapter, make_reward_model, seal_again
from tests.tokenizers_for_tests import small_tokenizer


def failing(folder: Path) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in verify(str(folder)) if not check.ok]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "bf16"
    merge(str(llama_adapter()), str(folder), dtype="bf16")
    return folder


def test_bf16_stays_within_its_tolerance(merged: Path) -> None:
    manifest = Manifest.load(merged)
    assert manifest.merge is not None
    assert 0 < manifest.merge.drift <= 0.1
    assert manifest.golden == Manifest.load(llama_adapter()).golden, "golden scores stay those of training"
    assert failing(merged) == []


def test_a_merged_model_is_stock(merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "score"}
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    tensors = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["score.weight"].shape == (1, 64)
    assert not any("lora" in name or "lm_head" in name or "absmax" in name for name in tensors)
    assert AutoTokenizer.from_pretrained(merged).chat_template == small_tokenizer().chat_template


def test_a_pipeline_gives_raw_scores(merged: Path) -> None:
    """Without problem_type "regression" transformers (and vLLM) apply a sigmoid to a single label."""
    text = "What is the capital of France? Paris.</s>"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    logit = score_sequences(model, [tokenizer(text)["input_ids"]], pad_token_id=2).item()
    result = pipeline("text-classification", model=model, tokenizer=tokenizer)(text)[0]
    assert result["label"] == "score"
    assert result["score"] == pytest.approx(logit, abs=1e-2)
    assert not 0 <= result["score"] <= 1, "the toy's score would show a sigmoid"


@pytest.mark.slow
def test_a_checkpoint_without_golden_items_gets_some(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, golden=False)
    merge(str(folder), str(tmp_path / "merged"), dtype="fp32")
    assert len(Manifest.load(tmp_path / "merged").golden) == 6
    assert failing(tmp_path / "merged") == []


def test_merged_models_load_as_reward_models(merged: Path) -> None:
    loaded = RewardModel.load(str(merged))
    assert loaded.manifest is not None
    for item in loaded.manifest.golden:
        for score, golden in zip(loaded.score_candidates([item.candidates()])[0], item.scores, strict=True):
            assert abs(score - golden) <= ROUNDED.of(golden)


class TestRefusals:
    def nothing_is_left(self, folder: Path) -> None:
        assert list(folder.iterdir()) == []

    def test_an_output_that_is_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "kept.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(UserError, match="not an empty folder"):
            merge(str(llama_adapter()), str(tmp_path))
        assert (tmp_path / "kept.txt").read_text(encoding="utf-8") == "mine"

    def test_an_output_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot be written"):
            merge(str(llama_adapter()), str(tmp_path / "file" / "merged"))

    def test_a_whole_model(self, merged: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="already is one whole model"):
            merge(str(merged), str(tmp_path / "again"))
        self.nothing_is_left(tmp_path)

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = streaming.shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(streaming.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(UserError, match="GB free"):
            merge(str(llama_adapter()), str(tmp_path / "merged"))
        self.nothing_is_left(tmp_path)

    def test_another_base(self, tmp_path: Path) -> None:
        base = save_backbone(tmp_path / "base", "llama", small_tokenizer(), seed=5)
        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match="does not give its golden scores on this base"):
            merge(str(llama_adapter()), str(tmp_path / "out" / "merged"), base_model=base)
        self.nothing_is_left(tmp_path / "out")

    @pytest.mark.parametrize("spoil", ["weights", "head"])
    def test_drift(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
        """The comparison reads what was written, so that any kind of wrong merge is caught."""
        write: Callable[..., None] = Shards.write

        def spoilt(shards: Shards, name: str, pieces: Any) -> None:
            wrong = name == ("score.weight" if spoil == "head" else "model.layers.1.mlp.down_proj.weight")
            write(shards, name, (piece * 1.2 for piece in pieces) if wrong else pieces)

        monkeypatch.setattr(Shards, "write", spoilt)
        with pytest.raises(UserError, match="drift from the golden ones"):
            merge(str(llama_adapter()), str(tmp_path / "merged"))
        self.nothing_is_left(tmp_path)

    def test_an_adapter_that_is_not_finite(self, tmp_path: Path) -> None:
        folder = copy_of(llama_adapter(), tmp_path / "adapter")
        tensors = load_file(folder / "adapter_model.safetensors")
        next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = float("nan")
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        edit_json(folder / FILE_NAME, golden=[])
        seal_again(folder)
        (tmp_path / "out").mkdir()
        with pytest.raises(UserError, match="no numbers"):
            merge(str(folder), str(tmp_path / "out" / "merged"))
        self.nothing_is_left(tmp_path / "out")

    def test_an_interruption(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(merging, "read_back", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(str(llama_adapter()), str(tmp_path / "merged"))
        self.nothing_is_left(tmp_path)
