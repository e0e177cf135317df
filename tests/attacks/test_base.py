"""A base that was changed in bytes that the samples do not cover."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_rm.artifacts.base_hash import hash_of_base
from qlora_rm.artifacts.hashes import SAMPLE_BYTES, SAMPLES
from qlora_rm.artifacts.manifest import FILE_NAME, Base, Manifest
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import parse
from qlora_rm.training.resume_terms import Terms, reconcile
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import llama_adapter
from tests.tokenizers_for_tests import small_tokenizer

CATEGORY = "Training: the base"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base, and a copy that differs in a single weight between two samples."""
    folder = tmp_path_factory.mktemp("bases")
    one = save_backbone(folder / "one", "llama", small_tokenizer())
    two = shutil.copytree(one, folder / "two")
    tensors = load_file(two / "model.safetensors")
    tensors["padding"] = torch.zeros(SAMPLES * SAMPLE_BYTES)  # large enough that samples leave gaps
    save_file(tensors, Path(one) / "model.safetensors", metadata={"format": "pt"})
    data = bytearray((Path(one) / "model.safetensors").read_bytes())
    place = len(data) * 40 // SAMPLES + SAMPLE_BYTES + 100
    data[place] ^= 0x40
    (two / "model.safetensors").write_bytes(data)
    return one, str(two)


def test_the_full_hash_sees_what_samples_do_not(bases: tuple[str, str]) -> None:
    one, two = bases
    sampled = Base.of(one)
    assert sampled.changes(two) == []
    full = replace(sampled, weights_sha256=hash_of_base(one))
    assert full.changes() == [] and full.changes(two) == ["its weights (sha256 of every byte)"]
    assert hash_of_base(str(Path(one) / "nowhere")) is None


def test_a_resumed_run_compares_it_where_both_were_told_to(bases: tuple[str, str], tmp_path: Path) -> None:
    def terms(base: str, how: str) -> Terms:
        options = parse(
            ["--model_name_or_path", base, "--dataset", "rows", "--verify_base", how, "--output_dir", str(tmp_path)]
        )
        return Terms.of(options, hash_of_base(base) if how == "full" else None)

    (tmp_path / "scheduler.pt").touch()
    one, two = bases
    for before, now, refused in (
        (terms(one, "full"), terms(one, "full"), False),
        (terms(one, "full"), terms(two, "full"), True),
        (terms(one, "full"), terms(two, "sample"), False),
        (terms(one, "sample"), terms(two, "full"), False),
    ):
        if refused:
            with pytest.raises(UserError, match="every byte of its weights"):
                reconcile(before, now, None, tmp_path)
        else:
            reconcile(before, now, None, tmp_path)


def test_a_manifest_from_before_is_read(tmp_path: Path) -> None:
    content = json.loads((Path(str(llama_adapter())) / FILE_NAME).read_text(encoding="utf-8"))
    del content["base"]["weights_sha256"], content["content_sha256"]
    content["schema_version"] = 3
    (tmp_path / FILE_NAME).write_text(json.dumps(content), encoding="utf-8")
    assert Manifest.load(tmp_path).base.weights_sha256 is None
