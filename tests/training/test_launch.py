"""Two real CPU ranks: DDP, DeepSpeed ZeRO-2 and ZeRO-3 with real NF4 give one process's result, on forests too."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.training.disk import checkpoint_bytes
from qlora_rm.training.run import main
from qlora_rm.verification.folder import verify
from tests.launching import launch, short_run
from tests.said import unknown

pytestmark = [pytest.mark.slow, pytest.mark.long]


STEPS = {"max_steps": 20, "eval_steps": 10, "save_steps": 10}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, backbone_folder, rows_file):
    """Runs of one process with two ranks' global batch, by accumulating two micro-batches; padded, and as forests."""
    folders = {}
    for share in ("false", "true"):
        folders[share] = tmp_path_factory.mktemp(f"share_{share}") / "out"
        flags = short_run(backbone_folder, rows_file, folders[share], gradient_accumulation_steps=2, **STEPS)
        main([*flags, "--share_prefix", share])
    return folders


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def tokens_computed(folder: Path) -> int:
    """Return the tokens that all ranks together put through the backbone in training."""
    return max(int(entry["num_tokens"]) for entry in log_of(folder) if "num_tokens" in entry)


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-4, msg=name)


def test_forests_end_where_padded_batches_end(one_process):
    assert_same_weights(one_process["true"], one_process["false"])
    assert tokens_computed(one_process["true"]) < 0.8 * tokens_computed(one_process["false"])


@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero2", "cpu_zero3"])
def test_two_ranks_end_where_one_process_ends(one_process, backbone_folder, rows_file, tmp_path, config):
    out = tmp_path / "out"
    engine = config.removeprefix("cpu_")
    flags = short_run(backbone_folder, rows_file, out, engine=engine, max_length=256, **STEPS)
    done = launch(config, flags, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-5000:]
    assert (done.stdout, unknown(done.stderr)) == ("", []), "lines that are none of ours"
    assert f"engine: {engine}, 2 processes on cpu, fp32; forests" in done.stderr
    assert tokens_computed(out) == tokens_computed(one_process["true"])  # of both ranks, each shared prompt once
    assert_same_weights(out, one_process["false"])
    counted = checkpoint_bytes(sum(weight.numel() for weight in weights(out).values()), engine)
    written = sum(file.stat().st_size for file in (out / "checkpoint-20").rglob("*") if file.is_file())
    assert counted <= written <= counted + 400_000
    states = list((out / "checkpoint-20").rglob("*model_states.pt"))
    assert len(states) == {"ddp": 0, "zero2": 1, "zero3": 2}[engine]
    for state in states:  # every rank leaves out the quantization constants, which follow from the base's own files
        assert not [key for key in torch.load(state, weights_only=False)["module"] if "base_layer" in key]
    manifest = Manifest.load(out)
    model = RewardModel.load(str(out))
    assert manifest.golden and manifest.reward.n == 48
    for item in manifest.golden:
        assert model.score_candidates([item.candidates()])[0] == pytest.approx(item.scores, abs=1e-4)


def test_a_model_fine_tuned_whole_under_zero3_is_saved_whole(backbone_folder, rows_file, tmp_path):
    """In fp32: the weights that gave the golden scores, close to one process's, and the same in its checkpoints."""
    whole = {"quantization": "none", "use_lora": False, "max_steps": 4}
    one, two = tmp_path / "one", tmp_path / "two"
    main(short_run(backbone_folder, rows_file, one, gradient_accumulation_steps=2, **whole))
    done = launch("cpu_zero3", short_run(backbone_folder, rows_file, two, engine="zero3", **whole))
    assert done.returncode == 0, done.stderr[-5000:]
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert weight.dtype == torch.float32, name
        torch.testing.assert_close(weight, mine[name], rtol=0, atol=1e-4, msg=name)
    assert (two / "checkpoint-4/model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    counted = checkpoint_bytes(sum(weight.numel() for weight in theirs.values()), "zero3")
    written = sum(file.stat().st_size for file in (two / "checkpoint-4").rglob("*") if file.is_file())
    assert counted <= written <= counted + 400_000
    assert [check.name for check in verify(str(two)) if not check.ok] == []


def test_uneven_ends_starve_no_rank_and_count_every_held_out_pair_once(backbone_folder, rows_file, tmp_path):
    """67 training and 29 held-out comparisons over two ranks; the same model evaluated by one process agrees."""
    shares = {"eval_fraction": 0.3, "eval_strategy": "epoch", "save_strategy": "epoch", "per_device_eval_batch_size": 3}
    two, one = tmp_path / "two", tmp_path / "one"
    done = launch("cpu_ddp", short_run(backbone_folder, rows_file, two, max_steps=-1, **shares))
    assert done.returncode == 0, done.stderr[-5000:]
    main(short_run(backbone_folder, rows_file, one, adapter=two, learning_rate=0, **shares | {"max_steps": 1}))
    last = [entry for entry in log_of(two) if "eval_loss" in entry][-1]
    alone = [entry for entry in log_of(one) if "eval_loss" in entry][-1]
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward", "eval_std_reward"):
        assert last[name] == pytest.approx(alone[name], abs=1e-5), name
    assert Manifest.load(two).reward.n == 58


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("config", ["cpu_zero2", "cpu_zero3"])
def test_deepspeed_resumes_where_it_stopped(backbone_folder, rows_file, tmp_path, config):
    def run(out, **changes):
        done = launch(config, short_run(backbone_folder, rows_file, out, **changes))
        assert done.returncode == 0, done.stderr[-5000:]
        return load_file(out / "adapter_model.safetensors")

    through = run(tmp_path / "out")
    (tmp_path / "out/checkpoint-8/COMPLETE").unlink()
    (tmp_path / "out/rm_manifest.json").unlink()  # written last, so this is an interrupted run
    (tmp_path / "out/adapter_model.safetensors").unlink()
    resumed = run(tmp_path / "out", resume="auto")
    for name, weight in through.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0, msg=name)


def test_an_8_bit_backbone_is_refused_under_zero3(backbone_folder, rows_file, tmp_path):
    done = launch("cpu_zero3", short_run(backbone_folder, rows_file, tmp_path / "out", quantization="8bit"))
    assert done.returncode != 0
    assert done.stderr.count("error: The DeepSpeed configuration ds_configs/cpu_zero3.json") == 1, done.stderr[-3000:]
    assert "use --quantization 4bit" in done.stderr
    assert "compute dtype" not in done.stderr, "told before weights are loaded"


def test_an_engine_that_is_not_in_force_is_noticed(backbone_folder, rows_file, tmp_path):
    """The launcher's own --cpu drops DeepSpeed silently; the `engine` option detects it."""
    done = launch("cpu_zero3", short_run(backbone_folder, rows_file, tmp_path / "out", engine="zero3"), "--cpu")
    assert done.returncode != 0
    assert "The engine asked for is zero3, the one in force is single" in done.stderr
    assert "compute dtype" not in done.stderr, "told before weights are loaded"
