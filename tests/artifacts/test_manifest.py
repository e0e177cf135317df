"""A manifest is read back as written, and nothing else is accepted as one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_rm.artifacts.golden import ROUNDED, SAME, GoldenItem, drift, make_golden
from qlora_rm.artifacts.manifest import FILE_NAME, Base, Manifest, Merge, Step, hash_of_template, make_contract
from qlora_rm.artifacts.manifest_page import page
from qlora_rm.errors import UserError
from qlora_rm.preferences import EOS_RULE, Candidates, Tokenization
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import HELD_OUT, HELD_OUT_TEXT, llama_adapter
from tests.tokenizers_for_tests import small_tokenizer

SINCE_VERSION_3 = ("date", "trained_on", "text_as")
"""Keys of the contract."""


def lengths(sequences: list[list[int]]) -> torch.Tensor:
    return torch.tensor([float(len(ids)) for ids in sequences])


def test_is_read_back_as_written(tmp_path: Path) -> None:
    manifest = replace(Manifest.load(llama_adapter()), merge=Merge("by hand", "bf16", "fp32", 0.25), files={})
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_version_1_is_read(tmp_path: Path) -> None:
    """As the first release wrote it: no fingerprint of the base, no hashes, no history."""
    content = json.loads((llama_adapter() / FILE_NAME).read_text(encoding="utf-8"))
    merge = {"method": "by hand", "dtype": "bf16", "compared_in": "fp32", "drift": 0.25}
    old = {key: value for key, value in content.items() if key not in ("history", "files", "noise", "content_sha256")}
    old |= {"schema_version": 1}
    old["contract"] = {key: old["contract"][key] for key in content["contract"] if key not in SINCE_VERSION_3}
    old |= {"merge": merge, "base": {k: v for k, v in content["base"].items() if k != "weights_fingerprint"}}
    (tmp_path / FILE_NAME).write_text(json.dumps(old), encoding="utf-8")
    manifest = Manifest.load(tmp_path)
    assert manifest.merge == Merge(**merge)
    assert (manifest.schema_version, manifest.history, manifest.files) == (1, [], {})
    assert manifest.golden == Manifest.load(llama_adapter()).golden
    assert manifest.base.changes() == []


def test_version_2_is_read(tmp_path: Path) -> None:
    """A file without measured rounding noise."""
    content = json.loads((llama_adapter() / FILE_NAME).read_text(encoding="utf-8"))
    old = {key: value for key, value in content.items() if key not in ("noise", "content_sha256")} | {
        "schema_version": 2
    }
    old["contract"] = {key: old["contract"][key] for key in content["contract"] if key not in SINCE_VERSION_3}
    (tmp_path / FILE_NAME).write_text(json.dumps(old), encoding="utf-8")
    manifest = Manifest.load(tmp_path)
    assert (manifest.schema_version, manifest.noise) == (2, {})
    assert [getattr(manifest.contract, key) for key in SINCE_VERSION_3] == [None] * 3
    assert manifest.golden == Manifest.load(llama_adapter()).golden


def test_the_page_is_made_from_the_schema() -> None:
    written = (Path(__file__).parents[2] / "docs/manifest.md").read_text(encoding="utf-8")
    assert written == page(), "run python -m qlora_rm.artifacts.manifest_page > docs/manifest.md"
    assert "|  |" not in written, "a key without a word on it"


def test_expects_the_scores_of_the_last_step_that_changed_them() -> None:
    manifest = Manifest.load(llama_adapter())
    doubled = [[2 * score for score in item.scores] for item in manifest.golden]
    moved = drift(manifest.golden, doubled, ROUNDED)
    later = manifest.after(Step.of("requantize", {}, moved, doubled)).after(Step.of("export", {"for": "x"}, moved))
    assert [item.scores for item in later.expected()] == doubled
    assert later.golden == manifest.golden
    assert [step.name for step in later.history] == ["requantize", "export"]


def test_knows_its_files_and_its_base(tmp_path: Path) -> None:
    manifest = Manifest.load(llama_adapter())
    read = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"}
    assert read <= manifest.files.keys()
    assert FILE_NAME not in manifest.files
    other = save_backbone(tmp_path, "llama", small_tokenizer(), seed=3)
    assert manifest.base.changes(other) == ["its weights"]


def test_says_what_a_reader_must_know() -> None:
    manifest = Manifest.load(llama_adapter())
    assert manifest.contract.eos_rule == EOS_RULE
    assert (manifest.contract.max_length, manifest.contract.over_long) == (256, "truncate_prompt")
    assert Path(manifest.base.name_or_path).is_absolute()
    assert manifest.base.config_sha256
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= manifest.versions.keys()


def test_hub_ids_stay_as_they_are() -> None:
    assert Base.of("nobody/nothing-of-the-kind") == Base("nobody/nothing-of-the-kind", None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 7}, "schema version 7"),
        ({"qantization": "4bit"}, "unknown key 'qantization'. Did you mean 'quantization'?"),
        ({"golden": {}}, "golden must be a list"),
        ({"compute_dtype": 32}, "compute_dtype is 32. Allowed values: 'bf16', 'fp16', 'fp32'"),
        ({"contract": {}}, "contract lacks the key"),
        ({"golden": [{"prompt": ""}]}, "golden[0] lacks the key"),
        ({"reward": {"mean": "high", "std": 1, "n": 2}}, "reward: mean must be of type float"),
    ],
)
def test_refuses_what_the_schema_does_not_have(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = json.loads((llama_adapter() / FILE_NAME).read_text(encoding="utf-8"))
    (tmp_path / FILE_NAME).write_text(json.dumps(content | change), encoding="utf-8")
    with pytest.raises(UserError, match=FILE_NAME) as caught:
        Manifest.load(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ['{"schema_version": 1', "[]", "\xff"])
def test_refuses_a_broken_file(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=FILE_NAME):
        Manifest.load(tmp_path)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not written by qlora-rm"):
        Manifest.load(tmp_path)


def test_template_hash_follows_the_text() -> None:
    assert hash_of_template(small_tokenizer()) == hash_of_template(small_tokenizer())
    assert hash_of_template(small_tokenizer()) != hash_of_template(small_tokenizer(chat_template="{{ messages }}"))
    assert hash_of_template(small_tokenizer(chat_template=None)) is None


class TestGolden:
    def test_holds_the_sample_and_the_awkward(self) -> None:
        items = make_golden(HELD_OUT, Tokenization(small_tokenizer(), 128), lengths)
        assert [item.candidates() for item in items[:2]] == HELD_OUT
        assert len(items) == 8
        assert all(item.scores == [len(ids) for ids in item.token_ids] for item in items)
        longest = max(len(ids) for item in items for ids in item.token_ids)
        assert longest == 128, "the long item reaches the over-long rule"
        said = [item.responses[0][0]["content"] for item in items[2:]]
        assert "" in said
        assert any("</s>" in text for text in said)

    @pytest.mark.parametrize("max_length", [None, 300, 4096])
    @pytest.mark.parametrize("over_long", ["truncate_prompt", "drop", "error"])
    def test_the_long_item_never_outgrows_what_training_has_seen(self, max_length: int | None, over_long: Any) -> None:
        """Otherwise a model without that many positions would fail here, after all its training."""
        tokenization = Tokenization(small_tokenizer(), max_length, over_long)
        items = make_golden(HELD_OUT, tokenization, lengths)
        assert len(items) == 8
        assert 100 < max(len(ids) for item in items for ids in item.token_ids) <= 256

    def test_awkward_items_are_of_the_sample_s_kind(self) -> None:
        items = make_golden(HELD_OUT_TEXT, Tokenization(small_tokenizer(), 128), lengths)
        assert all(isinstance(item.prompt, str) for item in items)
        assert len(items) == 7

    def test_leaves_out_what_tokenization_faults(self) -> None:
        spells_pad = Candidates("Say <pad>: ", ("<pad>", "no"))
        items = make_golden([spells_pad], Tokenization(small_tokenizer(), 16, "drop"), lengths)
        assert spells_pad not in [item.candidates() for item in items]
        assert 0 < len(items) < 6, "the long ones are dropped too"

    def test_drift_counts_moved_scores_and_flips(self) -> None:
        item = GoldenItem("", ["a", "b", "c"], [[1], [2], [3]], [0.0, 1.0, 1.1])
        same = drift([item], [[0.0, 1.0, 1.1]], ROUNDED)
        assert same.ok
        assert (same.largest, same.scores, same.pairs) == (0.0, 3, 2), "b and c are closer than the flip margin"
        assert drift([item], [[0.05, 1.05, 1.02]], ROUNDED).ok, "close pairs may change their order"
        moved = drift([item], [[1.5, 1.0, 1.1]], ROUNDED)
        assert (moved.outside, moved.flips, moved.ok) == (1, 2, False)
        assert not drift([item], [[0.0, 1.0, 1.1 + 3e-4]], SAME).ok

    def test_a_score_that_is_no_number_is_drift(self) -> None:
        item = GoldenItem("", ["a", "b"], [[1], [2]], [0.0, 1.0])
        assert not drift([item], [[float("nan"), 1.0]], ROUNDED).ok

    def test_the_root_mean_square_has_a_bound_of_its_own(self) -> None:
        item = GoldenItem("", ["a", "b", "c"], [[1], [2], [3]], [0.0, 10.0, 20.0])
        all_moved, one_moved = [[0.5, 10.5, 20.5]], [[0.0, 10.5, 20.0]]
        allowed = replace(ROUNDED, absolute=1.0, typical=0.4)
        assert drift([item], all_moved, replace(allowed, typical=None)).ok
        assert not drift([item], all_moved, allowed).ok
        assert drift([item], one_moved, allowed).ok
        assert drift([item], all_moved, allowed).typical == pytest.approx(0.5)


def test_contract_is_that_of_the_tokenizer() -> None:
    tokenizer = small_tokenizer()
    contract = make_contract(tokenizer, Tokenization(tokenizer, None, "drop"))
    ids = (contract.bos_token_id, contract.eos_token_id, contract.pad_token_id)
    assert ids == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (contract.max_length, contract.over_long) == (None, "drop")
