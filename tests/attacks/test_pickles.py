"""Foreign checkpoints: none of their files runs code, whichever library reads it."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler

from qlora_rm.errors import UserError
from qlora_rm.training.checkpoints import mark_whole
from qlora_rm.training.reading_trainer import require_state
from qlora_rm.training.safe_loading import loading_safely, reading
from qlora_rm.training.unlogged import Progress
from qlora_rm.training.zero_resharding import convert
from tests.launching import launch, short_run
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer
from tests.training.conftest import preference_rows, write_rows

CATEGORY = "Checkpoints: pickles"


class Runs:
    """A value that runs a command when it is unpickled unsafely."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


class RunsThroughTorch(Runs):
    def __reduce__(self) -> Any:
        return torch.hub.load, ("nobody/nothing", "nothing")


class RunsThroughEval(Runs):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.proof)!r}, 'w')",)


class RunsWhenBuilt(Runs):
    """Runs through an allowed class with a forbidden state."""

    def __reduce__(self) -> Any:
        return LossScaler, (), {"scale": Runs(self.proof)}


@pytest.mark.parametrize("evil", [Runs, RunsThroughTorch, RunsThroughEval, RunsWhenBuilt])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "nested"])
def test_no_pickle_runs_whatever_a_library_asks_for(tmp_path: Path, evil: type[Runs], form: str) -> None:
    file, proof = tmp_path / "optimizer.pt", tmp_path / "proof"
    value: Any = evil(proof)
    if form == "bare pickle":
        file.write_bytes(pickle.dumps(value))
    else:
        holder = {"state": [{"deep": (value,)}]} if form == "nested" else value
        torch.save(holder, file, _use_new_zipfile_serialization=form != "legacy")
    with loading_safely(), pytest.raises(UserError, match=r"optimizer.pt (asks for|cannot be read)"):
        torch.load(file, map_location="cpu", weights_only=False)
    assert not proof.exists()


def test_what_checkpoints_hold_is_loaded(tmp_path: Path) -> None:
    value = {"loss_scaler": LossScaler(2.0), "weights": torch.ones(3), "sizes": {"a": torch.Size([2, 3])}, "n": 1}
    torch.save(value, tmp_path / "states.pt")
    with loading_safely():
        found = torch.load(tmp_path / "states.pt", weights_only=False)
    assert found["loss_scaler"].cur_scale == 2.0 and torch.equal(found["weights"], value["weights"])
    assert torch.load.__module__ == "torch.serialization"  # as before


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04.", b"PK\x03\x04half"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scheduler.pt").write_bytes(content)
    with reading(tmp_path), pytest.raises(UserError, match=r"scheduler.pt cannot be read"):
        torch.load(tmp_path / "scheduler.pt", weights_only=True)


STATES = [
    "",
    "[]",
    "{",
    "null",
    '{"global_step": 9}',
    '{"global_step": "4"}',
    '{"unknown": 1}',
    '{"global_step": 4, "epoch": "x"}',
    "[" * 99_999,
]


@pytest.mark.parametrize("content", STATES)
def test_a_strange_trainer_state_is_named(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="checkpoint-4"):
        require_state(folder)


PROGRESSES = [
    "",
    "[]",
    "null",
    "{}",
    '{"losses": 1, "logged_at": 0, "metrics": {}, "tokens": 0, "evaluation_due": false}',
]


@pytest.mark.parametrize("content", PROGRESSES)
def test_a_strange_progress_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "progress.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"progress.json cannot be read"):
        Progress.load(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of two ZeRO-2 ranks with a checkpoint, and a function for the flags of similar runs."""
    folder = tmp_path_factory.mktemp("zero2")
    base = save_backbone(folder / "base", "llama", small_tokenizer())
    rows = write_rows(folder / "pairs.jsonl", preference_rows(96))

    def flags(out: Path, steps: int) -> list[str]:
        how = {"max_steps": steps, "save_steps": 2, "eval_strategy": "no", "share_prefix": "false", "resume": "auto"}
        return short_run(base, rows, out, **how)

    done = launch("cpu_zero2", flags(folder / "out", 2))
    assert done.returncode == 0, done.stderr[-5000:]
    return flags, folder / "out"


@pytest.mark.long
@pytest.mark.slow
def test_no_file_of_a_deepspeed_checkpoint_runs_code(run: tuple[Any, Path], tmp_path: Path, tries: Any) -> None:
    """Tries each pickle for the conversion to another number of ranks, and all of them for a resume with the same number."""
    flags, made = run
    proof = tmp_path / "proof"
    names = [str(p.relative_to(made / "checkpoint-2")) for p in made.glob("checkpoint-2/global_step2/*.pt")]
    assert len(names) == 3
    for i, name in enumerate(names):
        checkpoint = shutil.copytree(made / "checkpoint-2", tmp_path / str(i) / "checkpoint-2")
        torch.save({"module": Runs(proof), "optimizer_state_dict": Runs(proof)}, checkpoint / name)
        mark_whole(checkpoint)  # the forged hashes match
        with pytest.raises(UserError, match=r"asks for posix.system"):
            convert(checkpoint)
        assert not proof.exists()
    out = shutil.copytree(made, tmp_path / "out")
    (out / "rm_manifest.json").unlink()
    for file in [
        *out.glob("checkpoint-2/**/*.pt"),
        *out.glob("checkpoint-2/*.pth"),
        out / "checkpoint-2/training_args.bin",
    ]:
        torch.save({"module": Runs(proof)}, file)
    mark_whole(out / "checkpoint-2")
    resumed = launch("cpu_zero2", flags(out, 4))
    assert resumed.returncode != 0 and "asks for posix.system" in resumed.stderr, resumed.stderr[-5000:]
    assert "] failed:" not in resumed.stderr and not proof.exists()  # the trace is the launcher's own
    assert json.loads((out / "checkpoint-2/COMPLETE").read_text(encoding="utf-8"))["files"]
    tries(len(names) + 1)
