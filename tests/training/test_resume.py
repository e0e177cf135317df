"""A run interrupted at any moment resumes from its last complete checkpoint and ends as if uninterrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.training.checkpoints import begin, checkpoints, is_whole
from qlora_rm.training.termination import SAME_SIGNAL, Termination
from tests.deep import SEED
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer
from tests.training.forking import Forks

pytestmark = [pytest.mark.slow, pytest.mark.long]

SWEEP = bool(SEED)
"""Whether to kill before every change to a file, not only before some; takes ten minutes."""
MOMENTS = 200 if SWEEP else 20

# 72 comparisons in steps of 10: eight steps per epoch, the last one padded; logs between saves, dropout, a best step
RUN = {
    "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": 12, "save_steps": 2, "eval_steps": 2,
    "logging_steps": 3, "lora_dropout": 0.1, "save_total_limit": 1, "metric_for_best_model": "loss", "resume": "auto",
}  # fmt: skip


@pytest.fixture(scope="module")
def flags_of(backbone_folder, rows_file):
    def make(out: Path, **changes) -> list[str]:
        options = RUN | {
            "model_name_or_path": backbone_folder, "dataset": rows_file, "eval_fraction": 0.25, "output_dir": out, "bf16": False,
            "learning_rate": 3e-3, "gradient_checkpointing": False, "disable_tqdm": True, "per_device_eval_batch_size": 4,
        } | changes  # fmt: skip
        return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="module")
def through(forks, flags_of, tmp_path_factory):
    """The uninterrupted run: its folder, and how it ended, with seconds counted from the beginning of training."""
    out = tmp_path_factory.mktemp("through") / "out"
    ended = forks.run(flags_of(out), in_training=True)
    assert ended.status == 0, ended.said
    return out, ended


def weights(folder: Path) -> dict[str, bytes]:
    return {name: w.numpy().tobytes() for name, w in load_file(folder / "adapter_model.safetensors").items()}


def log(folder: Path) -> list[dict]:
    """Return what was logged, without times and the last line's sum over a process's steps."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in history if "train_loss" not in line]


def assert_same_end(out: Path, through: Path) -> None:
    assert weights(out) == weights(through)
    assert log(out) == log(through)
    one, two = Manifest.load(out), Manifest.load(through)
    assert (one.golden, one.reward, one.training) == (two.golden, two.reward, two.training)
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (out, through)]
    assert states[0]["best_metric"] == states[1]["best_metric"]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]
    assert [path.name for path in checkpoints(str(out))] == [path.name for path in checkpoints(str(through))]
    assert all(is_whole(path) for path in checkpoints(str(out)))


def finish(forks: Forks, flags: list[str]) -> str:
    ended = forks.run(flags)
    assert ended.status == 0, ended.said
    return ended.said


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(forks, flags_of, through, tmp_path, seed):
    """Some runs are killed again after they resume."""
    draw = random.Random(4 * SEED + seed)
    for moment in range(MOMENTS // 4):
        out = tmp_path / str(moment)
        for _ in range(draw.choice((1, 1, 2))):
            forks.run(
                flags_of(out), kill_after=draw.uniform(0, 1) * through[1].seconds, in_training=draw.random() < 0.9
            )
        finish(forks, flags_of(out))
        assert_same_end(out, through[0])
        shutil.rmtree(out)


def test_killed_before_a_change_to_a_file(forks, flags_of, through, tmp_path):
    """In a save, while an older checkpoint is deleted, between the files of the finished model."""
    changes = through[1].changes
    in_the_last_flush = changes - 22  # of the finished model, before its manifest is written
    moments = range(changes) if SWEEP else sorted({*range(changes // 8, changes, changes // 7), in_the_last_flush})
    resumed_at = set()
    for moment in moments:
        out = tmp_path / str(moment)
        assert forks.run(flags_of(out), kill_at_change=moment).status == 128 + signal.SIGKILL
        said = finish(forks, flags_of(out))
        resumed_at |= {line.rpartition("-")[2] for line in said.splitlines() if line.startswith("resuming from")}
        assert_same_end(out, through[0])
        shutil.rmtree(out)
    assert "12" in resumed_at and len(resumed_at) > 3


def test_a_complete_run_says_so_and_changes_nothing(forks, flags_of, through):
    out = through[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "is complete: 12 steps" in finish(forks, flags_of(out))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    "strategy", [{}, {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}, {"eval_strategy": "epoch"}],
    ids=["steps", "epoch", "steps and epoch"],
)  # fmt: skip
def test_sigterm_saves_the_step_it_is_in(forks, flags_of, tmp_path, strategy):
    """In the middle of a step, in an epoch's last step, in an evaluation; the resumed run ends as if uninterrupted."""
    uninterrupted = tmp_path / "through"
    finish(forks, flags_of(uninterrupted, **strategy))
    first_evaluation = 3 if strategy == {} else 8
    for method, number in (("training_step", 5), ("training_step", 16), ("training_step", 23), ("prediction_step", 2)):
        out = tmp_path / f"{method}-{number}"
        ended = forks.run(flags_of(out, **strategy), end_at=[method, number])
        assert ended.status == 143 and "Traceback" not in ended.said, ended.said
        step = (number + 1) // 2 if method == "training_step" else first_evaluation
        assert f"checkpoint-{step}; go on with --resume auto" in ended.said or method == "prediction_step"
        finish(forks, flags_of(out, **strategy))
        assert_same_end(out, uninterrupted)


def test_the_last_checkpoint_outlives_training_beside_the_best(forks, flags_of, tmp_path):
    """An end while the finished model is saved, and a later, longer run, both resume from the last checkpoint."""
    out = tmp_path / "out"
    best_first = {"greater_is_better": True, "max_steps": 4}
    ended = forks.run(
        flags_of(out, **best_first), end_at=["prediction_step", 13]
    )  # after two evaluations of six batches
    assert ended.status == 143 and "checkpoint-4; go on with --resume auto" in ended.said, ended.said
    assert "checkpoint-4\n" in finish(forks, flags_of(out, **best_first))
    assert [path.name for path in checkpoints(str(out))] == ["checkpoint-2", "checkpoint-4"]
    assert torch.load(out / "training_args.bin", weights_only=False).save_total_limit == 1
    assert "checkpoint-4\n" in finish(forks, flags_of(out, **best_first | {"max_steps": 5}))


def test_the_best_weights_are_not_saved_as_the_last_step(forks, flags_of, tmp_path):
    """They are in memory if SIGTERM comes while the finished model is evaluated."""
    best_first = {"greater_is_better": True, "max_steps": 4, "save_strategy": "best", "load_best_model_at_end": True}
    ended = forks.run(flags_of(tmp_path / "out", **best_first), end_at=["prediction_step", 13])
    assert ended.status == 143 and [path.name for path in checkpoints(str(tmp_path / "out"))] == ["checkpoint-2"]
    finish(forks, flags_of(tmp_path / "out", **best_first))
    assert weights(tmp_path / "out") == weights(tmp_path / "out/checkpoint-2")


def test_sigterm_between_two_epochs_saves_the_step_before(forks, flags_of, tmp_path):
    """At the end of an epoch's evaluation, and after the last check for a signal; step 8 is not due for a save."""
    changes = {"eval_strategy": "epoch", "save_steps": 3, "max_steps": 10, "metric_for_best_model": None}
    finish(forks, flags_of(tmp_path / "through", **changes))
    for method, number in (("_determine_best_metric", 1), ("_run_epoch", 2)):
        out = tmp_path / method
        ended = forks.run(flags_of(out, **changes), end_at=[method, number])
        assert ended.status == 143 and "checkpoint-8; go on with --resume auto" in ended.said, ended.said
        assert "checkpoint-8\n" in finish(forks, flags_of(out, **changes))
        assert_same_end(out, tmp_path / "through")


@pytest.mark.parametrize(("method", "step"), [("training_step", 4), ("prediction_step", 2)])
def test_sigterm_to_all_processes_of_a_run_spares_its_data_workers(forks, flags_of, tmp_path, method, step):
    flags = flags_of(tmp_path / "out", dataloader_num_workers=1, max_steps=6)
    ended = forks.run(flags, end_at=[method, 7 if method == "training_step" else 2], whole_group=True)
    assert ended.status == 143 and f"checkpoint-{step}; go on with --resume auto" in ended.said, ended.said
    assert "Traceback" not in ended.said
    assert f"checkpoint-{step}\n" in finish(forks, flags)


FAILS_WITH_WORKERS = """
from functools import partial
from torch.utils.data import DataLoader
from qlora_rm.training.termination import outlive_sigterm
batches = iter(DataLoader(range(99), num_workers=2, worker_init_fn=partial(outlive_sigterm, None)))
next(batches)
raise ValueError("a defect")
"""


def test_data_workers_end_with_a_run_that_fails():
    """Python ends them by SIGTERM, and waits for them."""
    failed = subprocess.run([sys.executable, "-c", FAILS_WITH_WORKERS], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 1 and failed.stderr.strip().endswith("ValueError: a defect")


def test_sigterm_before_training_ends_at_once(forks, flags_of, tmp_path):
    early = forks.run(flags_of(tmp_path / "early"), kill_after=0.05, signals=[[signal.SIGTERM, 0]])
    assert early.status == 143 and not checkpoints(str(tmp_path / "early"))


@pytest.mark.parametrize("pause", [0, SAME_SIGNAL])
def test_only_a_later_sigterm_ends_at_once(pause):
    """A scheduler and the launcher may both send the first one."""
    child = os.fork()
    if child == 0:
        termination = Termination()
        with termination.watch():
            os.kill(os.getpid(), signal.SIGTERM)
            termination.asked_at -= pause
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-signal.SIGTERM if pause else 0)


REFUSED = {
    "lora_r": 4, "seed": 7, "quantization": "8bit", "label_smoothing": 0.1, "lora_dropout": 0.2, "gradient_accumulation_steps": 1,
    "optim": "sgd", "train_sampling_strategy": "sequential", "max_length": 99, "group_by_prompt": "true",
}  # fmt: skip


@pytest.fixture(scope="module")
def cut_off(forks, flags_of, tmp_path_factory):
    """A run that was asked to end at step 4."""
    out = tmp_path_factory.mktemp("cut_off") / "out"
    assert forks.run(flags_of(out, lora_dropout=0), end_at=["training_step", 8]).status == 143
    return out


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_resumed_run_cannot_change_is_refused(forks, flags_of, cut_off, name):
    ended = forks.run(flags_of(cut_off, **{"lora_dropout": 0, name: REFUSED[name]}))
    assert ended.status == 2, ended.said
    assert f"--{name}" in ended.said and str(REFUSED[name]) in ended.said.replace("True", "true")
    assert "to go on" in ended.said and "Traceback" not in ended.said


def test_a_changed_learning_rate_and_schedule_are_obeyed(forks, flags_of, cut_off, tmp_path):
    """From the resumed step on, the rates are those of a run that had the new options from its start."""
    changes = {
        "lora_dropout": 0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "max_steps": 14,
        "logging_steps": 1,
    }
    shutil.copytree(cut_off, tmp_path / "changed")
    said = finish(forks, flags_of(tmp_path / "changed", **changes))
    assert "resumed with --learning_rate 0.001 (was 0.003)" in said and "--lr_scheduler_type linear" in said
    finish(forks, flags_of(tmp_path / "new", **changes))
    rates = [
        {line["step"]: line["learning_rate"] for line in log(tmp_path / name) if "learning_rate" in line}
        for name in ("changed", "new")
    ]
    assert set(rates[0]) >= set(range(5, 15))
    assert all(rates[0][step] == rates[1][step] for step in range(5, 15))
    shutil.copytree(cut_off, tmp_path / "still")
    finish(forks, flags_of(tmp_path / "still", lora_dropout=0, learning_rate=0))
    assert weights(tmp_path / "still") == weights(cut_off / "checkpoint-4")


def test_another_base_is_refused(forks, flags_of, cut_off, backbone_folder, tmp_path):
    """One base has another shape; the other differs in a single weight tensor, as after a little training."""
    other = save_backbone(tmp_path / "other", "qwen2", small_tokenizer())
    tuned = shutil.copytree(backbone_folder, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += 1e-3
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    for base, named in ((other, "configuration and weights differ"), (str(tuned), "weights differ")):
        ended = forks.run(flags_of(cut_off, lora_dropout=0, model_name_or_path=base))
        assert ended.status == 2 and "another base" in ended.said and named in ended.said, ended.said
    moved = shutil.copytree(backbone_folder, tmp_path / "moved")
    shutil.copytree(cut_off, tmp_path / "out")
    assert "resuming from" in finish(forks, flags_of(tmp_path / "out", lora_dropout=0, model_name_or_path=moved))


def test_what_has_no_optimizer_or_later_ones_beside_it_is_refused(forks, flags_of, cut_off, tmp_path):
    finish(forks, flags_of(tmp_path / "out", save_only_model=True, save_total_limit=9))
    shutil.rmtree(tmp_path / "out/checkpoint-12")
    assert "--save_only_model" in forks.run(flags_of(tmp_path / "out", max_steps=20)).said
    ended = forks.run(flags_of(tmp_path / "out", resume=tmp_path / "out/checkpoint-4"))
    assert ended.status == 2 and "holds a later checkpoint, checkpoint-10" in ended.said


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes, or remounts it with more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int, *options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size // 1024}k"]), "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system needs root")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize("room", ["not for one", "not for two", "for one and most of another"])
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint_whole(forks, flags_of, through, small_disk, room):
    """The second case is detected before anything is written, the others while writing."""
    files = [path.stat().st_size for path in (through[0] / "checkpoint-12").rglob("*") if path.is_file()]
    taken = sum(-(-size // 4096) * 4096 for size in files)  # a file takes full pages
    size = {
        "not for one": taken // 2,
        "not for two": taken * 3 // 2,
        "for one and most of another": taken + sum(files) + 8192,
    }
    out = small_disk(size[room]) / "out"
    ended = forks.run(flags_of(out), tight=True)
    assert ended.status == 2 and "Traceback" not in ended.said, ended.said
    assert "could not be written" in ended.said and "MB are free there" in ended.said
    left = checkpoints(str(out))
    assert [path.name for path in left] == ([] if room == "not for one" else ["checkpoint-2"])
    assert all(is_whole(path) for path in left)
    small_disk(64 << 20, "remount")
    finish(forks, flags_of(out))
    assert_same_end(out, through[0])


def test_what_a_kill_left_of_a_save_makes_room_for_the_next(forks, flags_of, through, small_disk):
    """The half-written folder is removed before free space is measured."""
    out = small_disk(64 << 20) / "out"
    assert forks.run(flags_of(out), end_at=["training_step", 4], tight=True).status == 143
    begin(out / "checkpoint-4")
    with (out / "checkpoint-4/optimizer.pt").open("wb") as half:
        half.write(bytes(shutil.disk_usage(out).free - 8192))
    ended = forks.run(flags_of(out), tight=True)
    assert ended.status == 0, ended.said
    assert_same_end(out, through[0])
