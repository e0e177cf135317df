"""transformers 4.57 reads what 5 has written: rotary parameters, tokenizers, scores."""

import json
from pathlib import Path

import pytest

from qlora_rm.artifacts.exporting import write
from qlora_rm.artifacts.exporting.export import export
from qlora_rm.artifacts.exporting.reader import IN_V4
from qlora_rm.artifacts.golden import SAME, drift
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.merge import merge
from tests.models_for_tests import BACKBONES
from tests.readers.overlays import HERE, overlay, run_in
from tests.reward_models_for_tests import make_reward_model
from tests.tokenizers_for_tests import ENDS_WITH_EOS, small_tokenizer

ARCHITECTURES = (
    "llama",
    "llama_far",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_far",
    "phi3",
    "gpt2",
)
ROWS = 512  # some models' tokenizer classes have tokens of their own


@pytest.fixture
def keep_apart(monkeypatch):
    """Makes export find that transformers 5 reads what is written for 4 otherwise."""
    return lambda: monkeypatch.setattr(write, "reads_the_same", lambda *_: False)


def exported_for_v4(folder: Path, architecture: str) -> Path:
    """Where transformers 4 loads an architecture's export from."""
    tokenizer = small_tokenizer(bos=False, chat_template=ENDS_WITH_EOS)
    model = make_reward_model(
        folder, architecture, quantization="none", tokenizer=tokenizer, rows=ROWS, max_length=None
    )
    merge(str(model), str(folder / "merged"), dtype="fp32")
    exported = export(str(folder / "merged"), ["rewardbench"], str(folder / "exported"))
    assert exported.ok, [check for check in exported.checks if not check.ok]
    apart = folder / "exported" / "v4"
    return apart if apart.exists() else folder / "exported"


@pytest.mark.slow
def test_golden_ids_and_scores_come_out_of_transformers_4(tmp_path, keep_apart):
    packages = overlay("transformers-4")
    folders = [exported_for_v4(tmp_path / name, name) for name in ARCHITECTURES]
    assert [folder.name for folder in folders] == ["exported"] * len(folders)
    keep_apart()
    folders.append(exported_for_v4(tmp_path / "apart", "llama_far"))
    assert folders[-1].name == "v4"
    classes = {
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0] for folder in folders
    }
    assert classes == IN_V4, "the allow-list names what this test has read, and nothing else"
    read = json.loads(run_in(packages, HERE / "in_transformers_4.py", *map(str, folders)).splitlines()[-1])
    for folder in folders:
        manifest, found = Manifest.load(folder), read[str(folder)]
        assert found["missing"] == []
        assert found["pad"] == manifest.contract.pad_token_id
        assert found["ids"] == [item.token_ids for item in manifest.golden], folder
        assert drift(manifest.golden, found["scores"], SAME).ok, folder


@pytest.mark.slow
def test_without_what_is_written_for_it_transformers_4_scores_otherwise(tmp_path):
    """The reason for all this: the same model with the keys taken out again is scored wrongly, and nobody says so."""
    packages, folder = overlay("transformers-4"), exported_for_v4(tmp_path, "llama_far")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}), encoding="utf-8"
    )
    read = json.loads(run_in(packages, HERE / "in_transformers_4.py", str(folder)).splitlines()[-1])
    assert not drift(Manifest.load(folder).golden, read[str(folder)]["scores"], SAME).ok


def test_the_architectures_are_among_the_tests_backbones():
    assert set(ARCHITECTURES) <= set(BACKBONES)
