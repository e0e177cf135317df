"""A mixture of experts from end to end: trained in 4 bit, resumed, sharded by ZeRO-3, merged, loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.cli import main as qlora_rm
from qlora_rm.merging.merge import merge
from qlora_rm.training.run import main
from tests.launching import ROOT, launch, short_run
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory):
    def folder(architecture):
        return save_backbone(tmp_path_factory.mktemp(architecture), architecture, small_tokenizer())

    return folder


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "lora_experts"), [("qwen3_moe", False), ("mixtral", True)])
def test_train_resume_merge_and_read_back(experts_folder, rows_file, tmp_path, architecture, lora_experts, capsys):
    def run(output, **changes):
        options = {"lora_experts": lora_experts, "save_steps": 2, "max_steps": 4} | changes
        main(short_run(experts_folder(architecture), rows_file, output, **options))
        return load_file(output / "adapter_model.safetensors")

    through, resumed = tmp_path / "through", tmp_path / "resumed"
    adapter = run(through)
    assert "nf4" in capsys.readouterr().err
    assert any(".experts." in name for name in adapter) == lora_experts
    shutil.copytree(through / "checkpoint-2", resumed / "checkpoint-2")
    for name, weight in run(resumed, resume_from_checkpoint="auto").items():
        assert torch.equal(weight, adapter[name]), name
    assert_scores_are_golden(through)
    merged = tmp_path / "merged"
    assert merge(str(through), str(merged), dtype="fp32").drift < 1e-4
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config and "one_by_one" not in str(config)
    capsys.readouterr()
    qlora_rm(["eval", str(merged), "--dataset", rows_file, "--quantization", "4bit"])
    said = capsys.readouterr()
    assert "accuracy" in said.out and "unquantized" not in said.err


def assert_scores_are_golden(folder):
    model, manifest = RewardModel.load(str(folder)), Manifest.load(folder)
    assert manifest.golden
    for item in manifest.golden:
        assert model.score_candidates([item.candidates()])[0] == pytest.approx(item.scores, abs=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_zero3_shards_packed_experts_and_ends_where_one_process_ends(experts_folder, rows_file, tmp_path):
    """With LoRA on the experts, and without activation checkpointing, which would hide what the forward pass keeps."""
    base, one, two = experts_folder("mixtral"), tmp_path / "one", tmp_path / "two"
    options = {"lora_experts": True, "gradient_checkpointing": False, "max_steps": 4}
    main(short_run(base, rows_file, one, gradient_accumulation_steps=2, share_prefix="false", **options))
    flags = short_run(base, rows_file, two, engine="zero3", **options)
    engine = json.loads((ROOT / "ds_configs/cpu_zero3.json").read_text())
    engine["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}  # frees at once
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    at_once = f"--deepspeed_config_file={tmp_path / 'engine.json'}"
    done = launch("cpu_zero3", flags, at_once, script="tests/training/experts_ranks.py")
    assert done.returncode == 0, done.stderr[-5000:]
    alone, adapter = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert adapter.keys() == alone.keys() and any(".experts." in name for name in adapter)
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=1e-4, msg=name)
    assert_scores_are_golden(two)
    for rank in range(2):
        for weight in json.loads((two / f"experts-{rank}.json").read_text()):
            assert weight["at rest"] == weight["whole"] // 2
            assert weight["gathered"] and weight["alive after forward"] == 0
