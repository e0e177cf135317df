"""Models pass `verify` and are exported wherever they read their score; a wrong score position is detected."""

import json
from pathlib import Path

import pytest

from qlora_rm.artifacts.manifest import FILE_NAME
from qlora_rm.backbone.layouts import ALL, FIRST, LAST
from qlora_rm.exporting.export import export
from qlora_rm.merging.merge import merge
from qlora_rm.verification.folder import verify
from tests.reward_models_for_tests import copy_of, edit_json, llama_adapter, make_reward_model

READ_AT = {
    "bert": FIRST,
    "roberta": FIRST,
    "distilbert": FIRST,
    "xlm_roberta": FIRST,
    "electra": FIRST,
    "deberta_v3": FIRST,
    "modernbert": FIRST,
    "modernbert_mean": ALL,
    "opt": LAST,
}
NAME = "score is read where the contract says"


def say_where(folder: Path, position: str) -> None:
    content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    edit_json(folder / FILE_NAME, contract=content["contract"] | {"score_position": position})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", READ_AT)
def test_sound_models_are_verified_and_exported(architecture: str, tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, architecture, quantization="none", max_length=100)
    say_where(folder, READ_AT[architecture])
    checks = {check.name: check for check in verify(str(folder))}
    assert [check for check in checks.values() if not check.ok] == []
    assert checks[NAME].detail == READ_AT[architecture]
    left = checks["batch scores equal single scores, left padded"]
    assert ("not tried" in left.detail) == (READ_AT[architecture] == FIRST)
    merge(str(folder), str(tmp_path / "merged"), dtype="fp32")
    exported = export(str(tmp_path / "merged"), ["transformers"], str(tmp_path / "exported"))
    assert exported.ok and (tmp_path / "exported/model.safetensors").exists()


def test_other_words_than_the_model_s_are_found(tmp_path: Path) -> None:
    folder = copy_of(llama_adapter(), tmp_path / "model")
    say_where(folder, FIRST)
    assert NAME in [check.name for check in verify(str(folder)) if not check.ok]


@pytest.mark.slow
def test_words_of_an_earlier_version_stay(tmp_path: Path) -> None:
    """Versions 1 and 2 named the last token for every model."""
    folder = make_reward_model(tmp_path, "distilbert", quantization="none")
    content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    contract = {key: value for key, value in content["contract"].items() if key != "rotary_length"}
    older = {key: value for key, value in content.items() if key != "noise"}
    older |= {"schema_version": 2, "content_sha256": None, "contract": contract | {"score_position": LAST}}
    (folder / FILE_NAME).write_text(json.dumps(older), encoding="utf-8")
    checks = {check.name: check for check in verify(str(folder))}
    assert [check for check in checks.values() if not check.ok] == []
    assert "earlier version" in checks[NAME].detail
