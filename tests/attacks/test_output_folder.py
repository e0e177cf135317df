"""Two runs with one output folder, log readers that disconnect, and folders unfit for output."""

import errno
import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_rm.errors import UserError
from qlora_rm.training import output_lock
from qlora_rm.training.checkpoints import begin, mark_whole, written_whole
from qlora_rm.training.disk import DiskNeed, checkpoint_bytes
from qlora_rm.training.output_folder import prepare, require_apart
from qlora_rm.training.output_lock import STALE_AFTER, Holder, OutputLock
from qlora_rm.training.permissions import open_to_umask

CATEGORY = "Training: the output folder"


def options(out: Path, **of_backbone: Any) -> Any:
    backbone = {"model_name_or_path": None, "tokenizer_name_or_path": None} | of_backbone
    adapter = backbone.pop("adapter", None)
    return SimpleNamespace(
        training=SimpleNamespace(output_dir=str(out), should_save=True, world_size=1),
        backbone=SimpleNamespace(**backbone),
        adapter=SimpleNamespace(adapter=adapter),
    )


def write(folder: Path, **changes: Any) -> Holder:
    """Write the lock of another process."""
    holder = replace(Holder.of_this_process(), **changes)
    (folder / ".lock").write_text(json.dumps(asdict(holder)), encoding="utf-8")
    return holder


@pytest.fixture
def ended() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_second_run_stops_with_one_sentence_and_the_first_keeps_its_lock(tmp_path: Path) -> None:
    with prepare(options(tmp_path)):
        before = (tmp_path / ".lock").read_bytes()
        with (
            pytest.raises(UserError, match=rf"is in use: process {os.getpid()} on .* trains there"),
            prepare(options(tmp_path)),
        ):
            pass
        assert (tmp_path / ".lock").read_bytes() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt, ValueError])
def test_the_lock_goes_whatever_ends_the_run(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), prepare(options(tmp_path)):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_ended_gives_way_at_once(
    tmp_path: Path, ended: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Covers a killed process, one whose pid was reused, and one whose parent has not yet waited for it."""
    zombie = subprocess.Popen(["true"])
    time.sleep(0.2)
    cases: tuple[dict[str, Any], ...] = ({"pid": ended}, {"started": "1"}, {"pid": zombie.pid, "started": "1"})
    for changes in cases:
        write(tmp_path, token="another", **changes)
        with prepare(options(tmp_path)):
            pass
        assert "taken over from process" in capsys.readouterr().err
    zombie.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_is_stale_after_its_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "LOOK_EVERY", 0.01)
    write(tmp_path, host="elsewhere", machine="other", token="another")
    old = time.time() - STALE_AFTER - 1
    os.utime(tmp_path / ".lock", (old, old))
    with prepare(options(tmp_path)):
        pass


def test_a_lock_of_another_machine_that_gives_a_sign_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run waits for it before it refuses, because the other machine may have just gone down."""
    write(tmp_path, host="elsewhere", machine="other", pid=7, token="another")
    monkeypatch.setattr(output_lock, "LOOK_EVERY", 0.01)
    looks = iter(range(100))
    sleep = time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda s: (next(looks) == 3 and os.utime(tmp_path / ".lock", (5e8, time.time()))) or sleep(s)
    )
    with pytest.raises(UserError, match="process 7 on elsewhere"), prepare(options(tmp_path)):
        pass
    assert capsys.readouterr().err.count("waiting up to 90 s") == 1


def test_a_clock_that_is_wrong_by_a_day_makes_no_lock_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ages are measured by the file system's clock."""
    lock = OutputLock(tmp_path)
    holder = write(tmp_path, host="elsewhere", machine="other", token="another")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert lock._has_ended(holder, (tmp_path / ".lock").stat().st_mtime) is None


@pytest.mark.parametrize(("restarts", "taken"), [("1", True), ("0", False)])
def test_a_requeued_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, taken: bool
) -> None:
    """Another step of the same job does not, because both may run at the same time."""
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    holder = write(tmp_path, host="elsewhere", machine="other", job="123", restart=0, token="another")
    reason = OutputLock(tmp_path)._has_ended(holder, time.time())
    assert (reason == "SLURM has started its job again") is taken


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": 1}', "\0"])
def test_a_lock_that_says_nothing_is_waited_for(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content, encoding="utf-8")
    lock = OutputLock(tmp_path)
    holder, beat = lock._read()
    assert holder is None and beat is not None and lock._has_ended(holder, beat) is None
    assert lock._has_ended(holder, beat - STALE_AFTER - 1)


def test_of_two_that_take_over_one_wins(tmp_path: Path, ended: int) -> None:
    """The slower run finds the new lock in place of the stale one, and puts it back."""
    stale = write(tmp_path, pid=ended, token="stale")
    slow, quick = OutputLock(tmp_path), OutputLock(tmp_path)
    quick.take()
    slow._remove_of(stale, "it has ended")
    with pytest.raises(UserError, match="is in use"):
        slow.take()
    quick.release()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_lost_its_lock_saves_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "HEARTBEAT", 0.02)
    lock = OutputLock(tmp_path)
    lock.take()
    (tmp_path / ".lock").unlink()
    time.sleep(0.2)
    assert (tmp_path / ".lock").exists() and lock.lost is None  # a deleted lock is written again
    write(tmp_path, pid=7, token="another")
    time.sleep(0.2)
    assert lock.lost and "process 7" in lock.lost
    lock.release()
    assert (tmp_path / ".lock").exists()


def test_what_killed_runs_left_goes_at_the_next_start(tmp_path: Path) -> None:
    kept = ["notes.txt", ".preflight-mine", "rm_manifest.json", "rm_manifest.json.bak"]
    for name in (*kept, f".preflight-{'0a' * 16}", "rm_manifest.json.4711"):
        (tmp_path / name).touch()
    (tmp_path / f".preflight-{'1b' * 16}").symlink_to(tmp_path / "notes.txt")
    with prepare(options(tmp_path)):
        found = {path.name for path in tmp_path.iterdir()}
    assert found == {*kept, ".lock", f".preflight-{'1b' * 16}"}


def test_the_output_is_apart_from_what_is_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "link").symlink_to(base)
    for out in (base, base / "run", tmp_path / "link", tmp_path / "base/../base", tmp_path / "link/run"):
        for name in ("model_name_or_path", "adapter", "tokenizer_name_or_path"):
            with pytest.raises(UserError, match=f"the folder of --{name}"):
                require_apart(options(out, **{name: str(base)}))
    require_apart(options(tmp_path, model_name_or_path=str(base)))
    require_apart(options(tmp_path / "base2", model_name_or_path=str(base)))


@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_permissions_of_the_umask(tmp_path: Path, mask: int, wanted: int) -> None:
    before = os.umask(mask)
    try:
        for name in ("adapter_model.safetensors", "secret.txt"):
            (tmp_path / name).touch(mode=0o600)
        open_to_umask(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "adapter_model.safetensors").stat().st_mode) == wanted
    assert stat.S_IMODE((tmp_path / "secret.txt").stat().st_mode) == 0o600


SAYS = """
import sys
from pathlib import Path
from qlora_rm.console import say
from qlora_rm.streams import outliving_readers
with outliving_readers() as readers:
    readers.log = Path(sys.argv[1])
    for i in range(9000):
        say(f"line {i}")
        print("from a library")
Path(sys.argv[1]).with_name("finished").touch()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("reader", ["2>&1 | head -1", "2>&1 | true", "> /dev/full 2>&1", "2>&1 | head -c 5"])
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path, reader: str, unbuffered: str) -> None:
    """Every line reaches the reader or the file, except for lines in transit."""
    command = f"{sys.executable} -c '{SAYS}' {tmp_path / 'train.log'} {reader}"
    told = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert (tmp_path / "finished").exists() and "Traceback" not in told.stdout + told.stderr
    logged = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert "the log goes on here" in logged and "line 8999\n" in logged


def test_a_full_disk_at_the_final_save_counts_the_checkpoints_there_are(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    begin(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(bytes(2_000_000))
    mark_whole(checkpoint)
    with pytest.raises(UserError) as full, written_whole(tmp_path, tmp_path, removed=False):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert f"The last complete checkpoint is {checkpoint}." in str(full.value) and "about 2.0 MB" in str(full.value)


def test_a_disk_that_holds_a_small_checkpoint_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint needs 1.9 MB and 6 MB are free. The extra space that a large vocabulary might need only warns."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=6_000_000))
    need = DiskNeed(checkpoint_bytes(158_000, "single"), 40_000_000)
    assert need.checkpoint == 1_896_000
    warning = need.require_room(tmp_path)
    assert warning and "6.0 MB free" in warning
    with pytest.raises(UserError, match=r"at least 6\.1 MB"):
        DiskNeed(6_100_000, 40_000_000).require_room(tmp_path)
