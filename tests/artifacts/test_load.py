"""A finished model loads as it was trained; anything else gives an error that names what it is."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_rm.artifacts.arithmetic import compute_dtype
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest
from qlora_rm.backbone import precision
from qlora_rm.config import AdapterConfig
from qlora_rm.errors import UserError
from qlora_rm.preferences import Candidates, RowFault
from tests.reward_models_for_tests import copy_of, edit_json, llama_adapter, make_reward_model


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(str(llama_adapter()))


def test_an_adapter_gives_its_golden_scores(model: RewardModel) -> None:
    assert model.manifest is not None
    for item in model.manifest.golden:
        assert model.score_candidates([item.candidates()])[0] == pytest.approx(item.scores, abs=1e-5)


def test_scores_keep_the_order_of_what_was_asked(model: RewardModel) -> None:
    assert model.manifest is not None
    items = model.manifest.golden[::-1]
    for scores, item in zip(model.score_candidates([item.candidates() for item in items]), items, strict=True):
        assert scores == pytest.approx(item.scores, abs=1e-5)


def test_what_cannot_be_scored_is_named_by_its_place(model: RewardModel) -> None:
    bad = Candidates("Say ", ("<pad>",))
    good = Candidates("Say ", ("hello",))
    fault = model.score_or_fault([good, bad, good])[1]
    assert isinstance(fault, RowFault)
    assert fault.kind == "pad_in_content"
    with pytest.raises(UserError, match="prompt 2: the pad token"):
        model.score_candidates([good, bad])


@pytest.mark.slow
def test_a_model_trained_whole_gives_its_golden_scores(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, adapter=AdapterConfig(use_lora=False), quantization="none")
    loaded = RewardModel.load(str(folder))
    assert loaded.manifest is not None
    for item in loaded.manifest.golden:
        assert loaded.score_candidates([item.candidates()])[0] == pytest.approx(item.scores, abs=1e-5)
    with pytest.raises(UserError, match="--base has no effect"):
        RewardModel.load(str(folder), base=str(tmp_path))


@pytest.mark.slow
def test_a_foreign_reward_model_loads_without_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_reward_model(tmp_path, adapter=AdapterConfig(use_lora=False), quantization="none")
    golden = Manifest.load(folder).golden
    (folder / FILE_NAME).unlink()
    loaded = RewardModel.load(str(folder))
    assert loaded.score_candidates([golden[0].candidates()])[0] == pytest.approx(golden[0].scores, abs=1e-5)
    assert "without a limit of length" in capsys.readouterr().err


@pytest.mark.slow
def test_another_place_of_the_base_can_be_given(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path / "made")
    shutil.move(tmp_path / "made" / "base", tmp_path / "moved")
    with pytest.raises(UserError, match="--base"):
        RewardModel.load(str(folder))
    loaded = RewardModel.load(str(folder), base=str(tmp_path / "moved"))
    assert loaded.manifest is not None
    item = loaded.manifest.golden[0]
    assert loaded.score_candidates([item.candidates()])[0] == pytest.approx(item.scores, abs=1e-5)


def test_another_base_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = copy_of(llama_adapter().parent / "base", tmp_path / "base")
    edit_json(base / "config.json", use_cache=False)  # changes no score
    RewardModel.load(str(llama_adapter()), base=str(base))
    assert "is not the one the adapter was trained on" in capsys.readouterr().err


def test_another_base_that_gives_other_scores_is_refused(tmp_path: Path) -> None:
    base = copy_of(llama_adapter().parent / "base", tmp_path / "base")
    edit_json(base / "config.json", rms_norm_eps=1e-2)
    with pytest.raises(
        UserError, match=r"its config.json of the base .* changed since training, and the golden scores"
    ):
        RewardModel.load(str(llama_adapter()), base=str(base))
    RewardModel.load(str(llama_adapter()), base=str(base), skip_checks=True)


class TestWrongFolder:
    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="it is empty"):
            RewardModel.load(str(tmp_path))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="There is no folder"):
            RewardModel.load(str(tmp_path / "nothing"))

    def test_one_above(self) -> None:
        with pytest.raises(UserError, match=r"Did you mean .*(base|model)\?"):
            RewardModel.load(str(llama_adapter().parent))

    def test_a_file(self) -> None:
        with pytest.raises(UserError, match="is a file"):
            RewardModel.load(str(llama_adapter() / FILE_NAME))

    def test_a_language_model(self) -> None:
        with pytest.raises(UserError, match="LlamaForCausalLM has no score head"):
            RewardModel.load(str(llama_adapter().parent / "base"))

    def test_a_classifier_that_lost_its_head(self, tmp_path: Path) -> None:
        base = copy_of(llama_adapter().parent / "base", tmp_path / "base")
        edit_json(base / "config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "score"})
        with pytest.raises(UserError, match="lacks weights of its score head"):
            RewardModel.load(str(base))

    def test_without_a_tokenizer(self, tmp_path: Path) -> None:
        folder = copy_of(llama_adapter(), tmp_path / "model")
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(UserError, match=r"tokenizer.json is gone"):
            RewardModel.load(str(folder))
        with pytest.raises(UserError, match="has no tokenizer"):
            RewardModel.load(str(folder), skip_checks=True)

    def test_with_another_pad_token(self, tmp_path: Path) -> None:
        folder = copy_of(llama_adapter(), tmp_path / "model")
        edit_json(folder / "tokenizer_config.json", pad_token="<|im_start|>")
        with pytest.raises(UserError, match=r"tokenizer_config.json has changed"):
            RewardModel.load(str(folder))
        with pytest.raises(UserError, match="the model was trained with 2"):
            RewardModel.load(str(folder), skip_checks=True)

    def test_an_adapter_without_a_manifest(self, tmp_path: Path) -> None:
        folder = copy_of(llama_adapter(), tmp_path / "model")
        (folder / FILE_NAME).unlink()
        with pytest.raises(UserError, match=FILE_NAME):
            RewardModel.load(str(folder))


def test_compute_dtype_follows_training_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = replace(Manifest.load(llama_adapter()), compute_dtype="bf16")
    for best, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        monkeypatch.setattr("qlora_rm.artifacts.arithmetic.best_dtype", lambda best=best: (best, precision.NAMES[best]))
        assert compute_dtype(trained) is expected
        assert compute_dtype(trained, "fp16") is torch.float16
        assert compute_dtype(Manifest.load(llama_adapter())) is torch.float32


@pytest.mark.slow
def test_a_model_trained_in_bf16_keeps_its_weights_on_a_cpu_without_bf16(tmp_path: Path) -> None:
    """Quantized from bf16 as in training, then computed in fp32: the weights equal the trained ones, bit for bit."""
    folder = make_reward_model(tmp_path, compute="bf16")
    in_bf16 = RewardModel.load(str(folder), precision="bf16").model.get_submodule("base_model.model.model.norm")
    in_fp32 = RewardModel.load(str(folder), precision="fp32").model.get_submodule("base_model.model.model.norm")
    assert (in_bf16.weight.dtype, in_fp32.weight.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(in_bf16.weight.float(), in_fp32.weight)
