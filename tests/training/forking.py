"""A process that has imported everything and forks a training run for each request, which saves seconds per run.

It must not train itself: autograd does not work in the fork of a process that has used it. Requests and replies are
JSON lines on standard input and output; `Forks` is the client.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Forks:
    """Train runs in forked processes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forking"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, flags: list[str], **how: Any) -> "Ended":
        """Run `qlora-rm train` with these flags.

        Arguments:
            kill_after: seconds after which the run is sent `signals`, each with the seconds to wait before the next;
                counted from the beginning of training if `in_training` is true.
            kill_at_change: the run kills itself before the change of this number to a file of its output folder.
            end_at: a method of the trainer and a number N: the run sends itself SIGTERM in the N-th call.
            whole_group: the SIGTERM of `end_at` comes from outside, to all processes of the run.
            tight: the disk is deliberately small, so the run does not measure it first.
            record: a folder for what `recorded_train` records.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"flags": flags, **how}) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class Ended:
    """How a run ended: its status as a shell reports it, its output, its duration, and how many files it changed."""

    def __init__(self, status: int, said: str, seconds: float, changes: int):
        self.status, self.said, self.seconds, self.changes = status, said, seconds, changes


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they are imported
    global recorded_train
    from tests.training import recorded_train

    for line in sys.stdin:
        replies.write(json.dumps(one_run(json.loads(line))) + "\n")
        replies.flush()


def one_run(request: dict[str, Any]) -> dict[str, Any]:
    out = Path(request["flags"][request["flags"].index("--output_dir") + 1])
    said, counted = out.with_suffix(".said"), out.with_suffix(".changes")
    start = time.monotonic()
    said.write_bytes(b"")
    child = os.fork()
    if child == 0:
        in_child(request, out, said, counted)
    while request.get("in_training") and b"engine:" not in said.read_bytes():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.005)
    training = time.monotonic()
    if "kill_after" in request:
        time.sleep(request["kill_after"])
        for number, pause in request.get("signals", [[signal.SIGKILL, 0]]):
            try:
                os.kill(child, number)
            except ProcessLookupError:
                break
            time.sleep(pause)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {
        "status": code if code >= 0 else 128 - code,
        "said": said.read_text(errors="replace"),
        "seconds": time.monotonic() - (training if request.get("in_training") else start),
        "changes": len(counted.read_bytes()),
    }


def in_child(request: dict[str, Any], out: Path, said: Path, counted: Path) -> None:
    from qlora_rm.cli import main
    from qlora_rm.training import disk

    written = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    count_changes(out, os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), request.get("kill_at_change"))
    if "end_at" in request:
        end_at(*request["end_at"], whole_group=request.get("whole_group", False))
    if "tight" in request:
        disk.DiskNeed.require_room = lambda *_: None
    if "record" in request:
        os.environ["RECORD"] = request["record"]
        recorded_train.record()
    status = 1
    try:
        status = main(["train", *request["flags"]])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def end_at(method: str, number: int, whole_group: bool) -> None:
    from qlora_rm.training.trainer import PreferenceTrainer

    real, count = getattr(PreferenceTrainer, method), 0
    if whole_group:
        os.setpgid(0, 0)

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == number and whole_group:
            subprocess.run(["sh", "-c", f"kill -TERM -{os.getpgid(0)}"], start_new_session=True, check=True)
            time.sleep(0.1)  # time for processes that the signal kills to end
        elif count == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    setattr(PreferenceTrainer, method, call)


def count_changes(out: Path, tally: int, kill_at: int | None) -> None:
    """Count files opened for writing, renamed, removed and flushed below `out`; end before change number `kill_at`."""
    count = 0

    def change() -> None:
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.write(tally, b".")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else "r" not in (mode or "r")
            if writes and str(path).startswith(str(out)):
                change()
        elif event in CHANGES and str(args[0]).startswith(str(out)):
            change()

    sys.addaudithook(hook)
    flush = os.fsync

    def fsync(handle: int) -> None:
        change()
        flush(handle)

    os.fsync = fsync


if __name__ == "__main__":
    serve()
