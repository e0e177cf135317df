"""What export writes for each reader, what it refuses, and that it leaves nothing behind then."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.cli import main
from qlora_rm.config import READER_NAMES, AdapterConfig, ExportConfig
from qlora_rm.errors import UserError
from qlora_rm.exporting import write
from qlora_rm.exporting.choice import reader_named
from qlora_rm.exporting.consumers import READERS, UNSUPPORTED
from qlora_rm.exporting.consumers_page import page
from qlora_rm.exporting.export import Exported, export
from qlora_rm.merging.merge import merge
from qlora_rm.verification.folder import verify
from tests.reward_models_for_tests import copy_of, edit_json, llama_adapter, make_reward_model, seal_again
from tests.tokenizers_for_tests import BOS, CHATML, ENDS_WITH_EOS, small_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MOST = [name for name in READER_NAMES if name not in ("peft", "verl")]


def merged_model(folder: Path, architecture: str = "llama", tokenizer=None, **settings) -> Path:
    tokenizer = tokenizer or small_tokenizer(bos=False, chat_template=ENDS_WITH_EOS)
    model = make_reward_model(folder, architecture, tokenizer=tokenizer, rows=512, **settings)
    merge(str(model), str(folder / "merged"), dtype="fp32")
    return folder / "merged"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A merged model that every reader takes; its adapter lies beside it."""
    return merged_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return merged_model(tmp_path_factory.mktemp("qwen2"), "qwen2", quantization="none")


def failed(exported: Exported) -> dict[str, str]:
    return {check.name: check.detail for check in exported.checks if not check.ok}


class TestWrites:
    @pytest.mark.slow
    def test_one_folder_for_all_that_read_whole_models(self, llama, tmp_path):
        out = tmp_path / "out"
        exported = export(str(llama), [*MOST, "verl"], str(out), ExportConfig(adapter=str(llama.parent / "model")))
        assert exported.ok, failed(exported)
        assert all(check.ok for check in verify(str(out))), "an exported folder is a model like any other"
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        assert config["problem_type"] == "regression"
        assert config["id2label"] == {"0": "score"}
        assert config["value_head_prefix"] == "score"
        assert config["rope_theta"] == 10000.0
        assert config["torch_dtype"] == "float32"
        assert not {"method", "classifier_from_token", "mean", "std"} & config.keys()
        assert '"use_activation": false' in (out / "vllm.yaml").read_text(encoding="utf-8")
        record = json.loads((out / "rm_export.json").read_text(encoding="utf-8"))
        assert record["ok"]
        assert record["readers"] == exported.readers
        assert "score.weight is the adapter's" in {check.name for check in exported.checks}

    @pytest.mark.slow
    def test_weights_are_links_to_the_source(self, llama, tmp_path):
        exported = export(str(llama), ["verl-critic"], str(tmp_path / "out"))
        files = [tmp_path / "out" / "model.safetensors", tmp_path / "out/value/model-00001-of-00002.safetensors"]
        assert all(os.path.samefile(llama / "model.safetensors", file) for file in files)
        assert exported.notes[0] == "files of weights: 2 linked"

    def test_or_copies_on_request(self, llama, tmp_path):
        exported = export(str(llama), ["transformers"], str(tmp_path / "out"), ExportConfig(copy_weights=True))
        assert not os.path.samefile(llama / "model.safetensors", tmp_path / "out" / "model.safetensors")
        assert exported.notes == ["files of weights: 1 copied"]

    @pytest.mark.slow
    def test_the_source_s_files_are_not_touched(self, llama, tmp_path):
        before = {path.name: path.read_bytes() for path in llama.iterdir()}
        export(str(llama), MOST, str(tmp_path / "out"))
        assert {path.name: path.read_bytes() for path in llama.iterdir()} == before

    @pytest.mark.slow
    def test_sglang_s_qwen_gets_a_bias_of_zeros(self, qwen, tmp_path):
        exported = export(str(qwen), ["sglang", "trl"], str(tmp_path / "out"))
        assert exported.ok, failed(exported)
        with safe_open(tmp_path / "out" / "model-00002-of-00002.safetensors", framework="pt") as file:
            assert file.get_tensor("score.bias").tolist() == [0.0]
        assert [check for check in verify(str(tmp_path / "out")) if not check.ok] == []

    @pytest.mark.slow
    def test_a_sharded_source(self, llama, tmp_path):
        source = copy_of(llama, tmp_path / "sharded")
        tensors = load_file(source / "model.safetensors")
        (source / "model.safetensors").unlink()
        shards = {f"model-{i:05}-of-00002.safetensors": list(tensors)[i - 1 :: 2] for i in (1, 2)}
        for shard, names in shards.items():
            save_file({name: tensors[name] for name in names}, source / shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        Manifest.load(source).save(source)  # as if it had been merged so
        exported = export(str(source), ["transformers", "verl-critic"], str(tmp_path / "out"))
        assert exported.ok, failed(exported)
        assert exported.notes[0] == "files of weights: 4 linked"

    @pytest.mark.slow
    def test_it_stands_in_the_manifest_s_history(self, llama, tmp_path):
        export(str(llama), ["vllm", "trl"], str(tmp_path / "out"))
        step = Manifest.load(tmp_path / "out").history[-1]
        assert (step.name, step.settings) == ("export", {"readers": ["vllm", "trl"]})

    @pytest.mark.slow
    def test_mean_and_std_only_on_request(self, llama, tmp_path):
        export(str(llama), ["openrlhf"], str(tmp_path / "out"), ExportConfig(normalize=True))
        config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
        reward = Manifest.load(llama).reward
        assert reward is not None
        assert (config["mean"], config["std"]) == (reward.mean, reward.std)

    def test_what_transformers_4_wants_stands_apart_where_5_would_misread_it(self, llama, tmp_path, monkeypatch):
        monkeypatch.setattr(write, "reads_the_same", lambda *_: False)
        exported = export(str(llama), ["rewardbench"], str(tmp_path / "out"))
        assert exported.ok, failed(exported)
        assert "rope_theta" not in json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
        assert "rope_theta" in json.loads((tmp_path / "out/v4/config.json").read_text(encoding="utf-8"))
        assert "out/v4" in (tmp_path / "out/README.md").read_text(encoding="utf-8")

    def test_an_adapter_with_its_base_named_for_anywhere(self, tmp_path):
        source = copy_of(llama_adapter(), tmp_path / "adapter")
        edit_json(source / "adapter_config.json", base_model_name_or_path="../base")
        seal_again(source)
        exported = export(str(source), ["peft"], str(tmp_path / "out"))
        assert exported.ok, failed(exported)
        named = json.loads((tmp_path / "out/adapter_config.json").read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
        assert Path(named) == llama_adapter().parent / "base"

    @pytest.mark.slow
    def test_an_adapter_on_a_base_that_moved(self, tmp_path):
        moved = shutil.copytree(llama_adapter().parent / "base", tmp_path / "moved")
        exported = export(str(llama_adapter()), ["peft"], str(tmp_path / "out"), base=str(moved))
        assert exported.ok, failed(exported)
        assert Manifest.load(tmp_path / "out").base.name_or_path == str(moved)
        assert [check for check in verify(str(tmp_path / "out")) if not check.ok] == []


class TestCard:
    @pytest.mark.slow
    def test_tells_data_figures_contract_and_limits(self, llama, tmp_path):
        evaluation = tmp_path / "evaluation.json"
        overall = {"accuracy": 0.75, "interval": [0.7, 0.8], "wins": 400}
        evaluation.write_text(
            json.dumps({"overall": overall, "prefer_longer": 0.5, "prefer_shorter": 0.5}), encoding="utf-8"
        )
        export(str(llama), ["trl", "vllm"], str(tmp_path / "out"), ExportConfig(evaluation=str(evaluation)))
        card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert "75.0% of 400 pairs (95 % interval 70.0% to 80.0%)" in card
        assert "mean 0.5000, standard deviation 1.5000 over 4" in card
        assert str(Manifest.load(llama).contract.chat_template_sha256) in card
        assert "Not checked when this folder was made: vllm" in card
        assert str(llama.parent / "base") not in card, "a folder of this machine means nothing to a reader"

    def test_a_file_that_is_no_evaluation(self, llama, tmp_path):
        (tmp_path / "x.json").write_text("{}", encoding="utf-8")
        with pytest.raises(UserError, match="qlora-rm eval"):
            export(str(llama), ["trl"], str(tmp_path / "out"), ExportConfig(evaluation=str(tmp_path / "x.json")))


class TestRefuses:
    """Scores that would be wrong there: the check is named, and no folder is left."""

    @staticmethod
    def refused(source: Path, names: list[str], tmp_path: Path, config: ExportConfig | None = None) -> dict[str, str]:
        exported = export(str(source), names, str(tmp_path / "out"), config)
        assert not exported.ok
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
        return failed(exported)

    @pytest.mark.slow
    def test_a_template_that_ends_turns_otherwise_than_a_policy_stops(self, tmp_path):
        source = merged_model(tmp_path / "model", tokenizer=small_tokenizer(bos=False, chat_template=CHATML))
        names = self.refused(source, ["transformers", "trl", "trl-ppo", "openrlhf", "verl-critic"], tmp_path)
        assert set(names) == {f"{name}: texts are scored as trained" for name in ("trl-ppo", "openrlhf", "verl-critic")}

    @pytest.mark.slow
    def test_a_bos_that_is_added_twice_or_lost(self, tmp_path):
        with_bos = f"{BOS}{ENDS_WITH_EOS}"
        twice = merged_model(tmp_path / "twice", tokenizer=small_tokenizer(bos=True, chat_template=with_bos))
        assert set(self.refused(twice, ["trl", "verl", "rewardbench"], tmp_path)) == {
            "rewardbench: texts are scored as trained"
        }
        tokenizer = small_tokenizer(bos=False, chat_template=with_bos)
        tokenizer.bos_token = BOS
        lost = merged_model(tmp_path / "lost", tokenizer=tokenizer)
        assert set(self.refused(lost, ["trl", "verl", "rewardbench"], tmp_path)) == {
            "verl: texts are scored as trained"
        }

    @pytest.mark.slow
    def test_plain_text_with_an_eos_for_trl(self, tmp_path):
        source = merged_model(tmp_path / "model", tokenizer=small_tokenizer(chat_template=None))
        names = self.refused(source, ["transformers", "trl", "rewardbench"], tmp_path)
        assert set(names) == {"trl: texts are scored as trained", "rewardbench: chat template is there"}

    def test_a_policy_that_no_reader_hands_ids_on_from(self, llama, tmp_path):
        with pytest.raises(UserError, match="--policy has no effect: none of vllm"):
            export(str(llama), ["vllm"], str(tmp_path / "out"), ExportConfig(policy=str(llama)))

    @pytest.mark.slow
    def test_a_policy_with_another_vocabulary(self, llama, tmp_path):
        other = tmp_path / "policy"
        small_tokenizer(vocab_size=300).save_pretrained(other)
        names = self.refused(llama, ["openrlhf"], tmp_path, ExportConfig(policy=str(other)))
        assert "openrlhf: policy has these tokens" in names
        assert "openrlhf: policy has this chat template" in names

    @pytest.mark.slow
    def test_scores_that_16_bit_cannot_hold(self, llama, tmp_path):
        source = copy_of(llama, tmp_path / "huge")
        tensors = load_file(source / "model.safetensors")
        tensors["score.weight"] *= 1e6
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        golden = json.loads((source / "rm_manifest.json").read_text(encoding="utf-8"))["golden"]
        golden = [item | {"scores": [score * 1e6 for score in item["scores"]]} for item in golden]
        edit_json(source / "rm_manifest.json", golden=golden)
        seal_again(source)
        assert "vllm: scores in fp16" in self.refused(source, ["vllm"], tmp_path)

    def test_a_model_whose_scores_have_moved(self, llama, tmp_path):
        source = copy_of(llama, tmp_path / "moved")
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"] += 0.1
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        seal_again(source)
        assert "golden scores are given again" in self.refused(source, ["transformers"], tmp_path)

    def test_what_needs_no_file_to_be_written(self, llama, qwen, tmp_path):
        adapter, out = str(llama.parent / "model"), str(tmp_path / "out")
        for source, names, message in (
            (str(llama), ["nobody"], "no such reader"),
            (str(llama), ["tei"], "encoder classifiers only"),
            (str(llama), ["llama.cpp"], "no score head for decoders"),
            (str(llama), ["peft"], "peft reads adapters"),
            (adapter, ["trl"], f"qlora-rm merge {adapter}"),
            (adapter, ["trl", "peft"], "export them apart"),
            (str(qwen), ["sglang", "vllm"], "export them apart"),
        ):
            with pytest.raises(UserError, match=message):
                export(source, names, out)
        assert not Path(out).exists()

    @pytest.mark.slow
    def test_an_architecture_that_is_not_known_there(self, tmp_path):
        source = merged_model(tmp_path / "gpt2", "gpt2", quantization="none")
        with pytest.raises(UserError, match="not known to score a GPT2ForSequenceClassification"):
            export(str(source), ["openrlhf"], str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("model.safetensors", "model.safetensors is gone"),
        ("tokenizer.json", "tokenizer"),
        ("rm_manifest.json", "not written by qlora-rm"),
        ("config.json", "neither adapter_config.json nor config.json"),
    ],
)
def test_a_source_that_lacks_a_file_is_told_in_one_line(llama, tmp_path, lost, message):
    source = copy_of(llama, tmp_path / "source")
    (source / lost).unlink()
    if lost == "tokenizer.json":
        (source / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=message):
        export(str(source), ["trl", "verl-critic"], str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_cut_short_and_a_wrong_adapter(llama, tmp_path):
    source = copy_of(llama, tmp_path / "source")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-1000])
    seal_again(source)
    with pytest.raises(UserError, match="broken or cut short"):
        export(str(source), ["trl"], str(tmp_path / "out"))
    with pytest.raises(UserError, match="missing, broken or cut short"):
        export(str(llama), ["trl"], str(tmp_path / "out"), ExportConfig(adapter=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("backbone", ["distilbert", "roberta"])
def test_encoders_for_whoever_reads_any_classifier(backbone, tmp_path):
    model = make_reward_model(
        tmp_path, backbone, quantization="none", adapter=AdapterConfig(use_lora=False), max_length=None
    )
    exported = export(str(model), ["transformers"], str(tmp_path / "out"))
    assert exported.ok, failed(exported)
    with pytest.raises(UserError, match="not known to score"):
        export(str(model), ["verl-critic"], str(tmp_path / "no"))


@pytest.mark.slow
def test_openrlhf_s_clipping_is_warned_of(llama, tmp_path):
    source = copy_of(llama, tmp_path / "source")
    edit_json(source / "rm_manifest.json", reward={"mean": 8.0, "std": 3.0, "n": 10})
    notes = export(str(source), ["openrlhf"], str(tmp_path / "out")).notes
    assert any("clips rewards at 10" in note and "17.0" in note for note in notes)


@pytest.mark.slow
def test_the_door(llama, tmp_path, capsys):
    words = ["export", str(llama), "--for", "trl", "vllm", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "ok    trl: texts are scored as trained" in printed
    assert "not checked: vllm" in printed
    assert main(words) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    other = tmp_path / "policy"
    small_tokenizer(vocab_size=300).save_pretrained(other)
    words = [
        "export",
        str(llama),
        "--for",
        "openrlhf",
        "--policy",
        str(other),
        "--output",
        str(tmp_path / "no"),
        "--json",
    ]
    assert main(words) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert not (tmp_path / "no").exists()


def test_names_in_help_are_the_rows():
    assert tuple(reader.name for reader in READERS) == READER_NAMES
    assert not set(UNSUPPORTED) & set(READER_NAMES)
    assert all(reader_named(name).name == name for name in READER_NAMES)


def test_the_page_of_readers_is_made_from_the_table():
    assert (ROOT / "docs/readers.md").read_text(encoding="utf-8") == f"{page()}\n"


def test_heads_are_compared_bit_by_bit(llama, tmp_path):
    adapter = copy_of(llama.parent / "model", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("score.weight"))
    tensors[name] = torch.nextafter(tensors[name], tensors[name] + 1)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    exported = export(str(llama), ["trl"], str(tmp_path / "out"), ExportConfig(adapter=str(adapter)))
    assert list(failed(exported)) == ["score.weight is the adapter's"]
