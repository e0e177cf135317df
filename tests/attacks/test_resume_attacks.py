"""Real runs that are killed, damaged or misled: where they resume, what they leave, and their exit status."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_rm.training.checkpoints import checkpoints, is_whole
from tests.attacks.conftest import contents_of
from tests.launching import ROOT
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer
from tests.training.conftest import preference_rows, write_rows
from tests.training.forking import Forks

CATEGORY = "Training: interruptions"
pytestmark = [pytest.mark.slow, pytest.mark.long]

RUN = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 8, "save_steps": 2, "eval_strategy": "no",
    "eval_fraction": 0, "logging_steps": 3, "learning_rate": 3e-3, "bf16": False, "disable_tqdm": True, "resume": "auto",
}  # fmt: skip


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_backbone(folder / "base", "llama", small_tokenizer())
    rows = write_rows(folder / "pairs.jsonl", preference_rows(64))

    def make(out: Path, **changes: Any) -> list[str]:
        options = RUN | {"model_name_or_path": base, "dataset": rows, "output_dir": out} | changes
        return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="module")
def through(forks: Forks, flags: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run. Its last two checkpoints are those of steps 6 and 8."""
    out = tmp_path_factory.mktemp("through") / "out"
    ended = forks.run(flags(out))
    assert ended.status == 0, ended.said
    return out


@pytest.fixture
def cut_off(through: Path, tmp_path: Path) -> Path:
    """The same run, killed after step 8 was saved and before the model was saved."""
    out = shutil.copytree(through, tmp_path / "out")
    (out / "rm_manifest.json").unlink()
    return out


def train_loss(out: Path) -> float:
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return next(line["train_loss"] for line in reversed(history) if "train_loss" in line)


def names(out: Path) -> list[str]:
    return [path.name for path in checkpoints(str(out))]


# ---- values that are not finite


@pytest.mark.parametrize(
    "changes", [{}, {"save_steps": 1, "save_total_limit": 1, "warmup_steps": 3}], ids=["default", "each step"]
)
def test_an_absurd_learning_rate_ends_the_run_and_keeps_what_was_sound(
    forks: Forks, flags: Callable[..., list[str]], cut_off: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    shutil.rmtree(cut_off / "checkpoint-8")
    before = contents_of(cut_off)
    ended = forks.run(flags(cut_off, learning_rate=1e30, **changes))
    assert ended.status == 2 and "Traceback" not in ended.said, ended.said
    assert (
        "finite" in ended.said
        and ("step 7" in ended.said or "step 8" in ended.said)
        and "pairs.jsonl, row" in ended.said
    )
    assert "The last usable checkpoint is" in ended.said and "checkpoint-6" in ended.said
    assert contents_of(cut_off) == before
    assert forks.run(flags(cut_off)).status == 0
    anew = forks.run(flags(tmp_path / "new", learning_rate=1e30, **changes))
    assert anew.status == 2 and "finite" in anew.said and not (tmp_path / "new/rm_manifest.json").exists()
    assert names(tmp_path / "new") == (["checkpoint-1"] if changes else [])  # the warm-up begins at a rate of 0


def test_one_row_of_an_absurd_weight_is_named(forks: Forks, flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """Whichever check stops it, no model is saved."""
    rows = preference_rows(64)
    rows[17]["weight"] = 1e308
    file = write_rows(tmp_path / "poisoned.jsonl", rows)
    ended = forks.run(flags(tmp_path / "out", dataset=file))
    assert ended.status != 0 and "Traceback" not in ended.said, ended.said
    assert "poisoned.jsonl" in ended.said and "row 18" in ended.said
    assert not (tmp_path / "out/rm_manifest.json").exists()
    assert all(
        weights_are_finite(load_file(path / "adapter_model.safetensors")) for path in checkpoints(str(tmp_path / "out"))
    )


def weights_are_finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(bool(weight.isfinite().all()) for weight in weights.values())


# ---- damage


def test_any_damage_leads_to_the_checkpoint_before(
    forks: Forks, flags: Callable[..., list[str]], through: Path, cut_off: Path
) -> None:
    """After 64 flipped bytes, the result equals the uninterrupted run's bit for bit, including the average loss."""
    file = cut_off / "checkpoint-8/optimizer.pt"
    data = bytearray(file.read_bytes())
    data[2000:2064] = bytes(byte ^ 0xFF for byte in data[2000:2064])
    file.write_bytes(data)
    with (cut_off / "checkpoint-6/README.md").open("a", encoding="utf-8") as card:
        card.write("!")
    ended = forks.run(flags(cut_off))
    assert ended.status == 0, ended.said
    assert "checkpoint-8: the contents of optimizer.pt have changed" in ended.said
    assert "resuming from" in ended.said and "checkpoint-6" in ended.said
    for name in ("adapter_model.safetensors", "checkpoint-8/adapter_model.safetensors"):
        assert (cut_off / name).read_bytes() == (through / name).read_bytes()
    assert is_whole(cut_off / "checkpoint-8") and train_loss(cut_off) == train_loss(through)


@pytest.mark.parametrize("at", [3, 5, 6])
def test_the_average_loss_after_a_kill(
    forks: Forks, flags: Callable[..., list[str]], through: Path, tmp_path: Path, at: int
) -> None:
    """Kills between log lines, at one, and at a save. Steps lose about 0.7, so a wrong average such as 671 would be seen."""
    out = tmp_path / "out"
    ended = forks.run(flags(out), end_at=["training_step", at])
    assert ended.status == 143, ended.said
    assert forks.run(flags(out)).status == 0
    assert train_loss(out) == train_loss(through)


def test_no_checkpoint_is_usable(forks: Forks, flags: Callable[..., list[str]], cut_off: Path) -> None:
    """As in a folder of TRL, the run stops with a message. With restart it begins, and replaces a step only at its next save."""
    for step in (6, 8):
        for name in ("COMPLETE", "progress.json", "run_terms.json"):
            (cut_off / f"checkpoint-{step}" / name).unlink()
    (cut_off / "checkpoint-99").mkdir()
    (cut_off / "checkpoint-99/optimizer.pt").touch()
    before = contents_of(cut_off)
    ended = forks.run(flags(cut_off))
    assert ended.status == 2 and "not made by qlora-rm" in ended.said and "--resume restart" in ended.said
    assert contents_of(cut_off) == before
    ended = forks.run(flags(cut_off, resume="restart", save_total_limit=1), end_at=["training_step", 3])
    assert ended.status == 143 and names(cut_off) == ["checkpoint-3", "checkpoint-6", "checkpoint-8", "checkpoint-99"]
    after = contents_of(cut_off)
    assert all(after[name] == content for name, content in before.items() if name.startswith("checkpoint-"))
    (cut_off / "checkpoint-3/COMPLETE").unlink()
    ended = forks.run(flags(cut_off, resume="restart", save_total_limit=1))
    assert ended.status == 0, ended.said
    assert names(cut_off) == ["checkpoint-3", "checkpoint-8", "checkpoint-99"] or "checkpoint-6" in names(cut_off)
    assert is_whole(cut_off / "checkpoint-8") and (cut_off / "checkpoint-99/optimizer.pt").exists()


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_has_the_name_of_a_checkpoint_to_come(
    forks: Forks, flags: Callable[..., list[str]], through: Path, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-4").touch() if what == "file" else (out / "checkpoint-4").symlink_to(through / "checkpoint-8")
    before, there = contents_of(out), contents_of(through)
    ended = forks.run(flags(out, resume="auto" if what == "file" else None))
    assert ended.status == 2 and "Traceback" not in ended.said and "checkpoint" in ended.said, ended.said
    assert contents_of(out) == before and contents_of(through) == there


def test_a_linked_checkpoint_is_gone_on_from_and_kept(
    forks: Forks, flags: Callable[..., list[str]], through: Path, tmp_path: Path
) -> None:
    out, there = tmp_path / "out", contents_of(through)
    out.mkdir()
    (out / "checkpoint-6").symlink_to(through / "checkpoint-6")
    ended = forks.run(flags(out, save_total_limit=1))
    assert ended.status == 0 and "resuming from" in ended.said, ended.said
    assert names(out) == ["checkpoint-6", "checkpoint-8"] and contents_of(through) == there
    assert (out / "adapter_model.safetensors").read_bytes() == there["adapter_model.safetensors"]


# ---- two runs, and a log reader that disconnects


def test_a_second_run_in_the_same_folder_changes_nothing(
    forks: Forks, flags: Callable[..., list[str]], through: Path, tmp_path: Path
) -> None:
    """It starts while the first run trains, as another process on the same machine."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", PAUSES, *flags(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GO_ON": str(tmp_path / "go")}
    first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr is not None
        for line in first.stderr:
            if line.startswith("engine:"):
                break
        second = forks.run(flags(out))
        (tmp_path / "go").touch()
        said = first.communicate(timeout=120)[1]
    finally:
        first.kill()
    assert first.returncode == 0, said
    assert second.status == 2 and f"process {first.pid}" in second.said and "is in use" in second.said, second.said
    assert (out / "adapter_model.safetensors").read_bytes() == (through / "adapter_model.safetensors").read_bytes()
    assert not (out / ".lock").exists()


PAUSES = """
import os, sys, time
from pathlib import Path
from qlora_rm.cli import main
from qlora_rm.training.trainer import PreferenceTrainer
step = PreferenceTrainer.training_step
def waits(*args, **kwargs):
    while not Path(os.environ["GO_ON"]).exists():
        time.sleep(0.05)
    return step(*args, **kwargs)
PreferenceTrainer.training_step = waits
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_dead_reader_of_the_log_and_a_kill_that_left_a_lock(
    forks: Forks, flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed = forks.run(flags(out), kill_after=0.1, in_training=True)
    assert killed.status == 128 + signal.SIGKILL and (out / ".lock").exists()
    command = f"{sys.executable} -m qlora_rm train {' '.join(flags(out))} 2>&1 | head -1; echo ${{PIPESTATUS[0]}}"
    told = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert told.stdout.splitlines()[-1] == "0" and len(told.stdout.splitlines()) == 2, told
    log = (out / "train.log").read_text(encoding="utf-8")
    assert "the log goes on here" in log and "qlora-rm verify" in log
    assert (out / "rm_manifest.json").exists() and not (out / ".lock").exists()
    assert oct((out / "adapter_model.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    known = os.umask(0)
    os.umask(known)
    return known
