"""A lock that allows only one run at a time in an output folder: `.lock` names the process that writes there.

Kernel locks do not work across every shared file system; a file created with O_EXCL does. The holder touches it every
`HEARTBEAT` seconds. On the same machine an ended process is detected at once; on another one, only by missing
heartbeats.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from qlora_rm.console import WARNING, say
from qlora_rm.errors import UserError

FILE_NAME = ".lock"
HEARTBEAT = 20.0
"""Seconds between two heartbeats."""
STALE_AFTER = 90.0
"""Seconds without a heartbeat after which a lock of another machine is taken over."""
UNSEEN = "unseen"
"""Start time of a living process whose details this user may not read."""
LOOK_EVERY = 1.0


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: name of its machine.
        machine: boot id and pid namespace of its machine, within which `pid` is unique.
        started: start time of the process, in kernel ticks; distinguishes it from a later process with the same pid.
        job, restart: SLURM's job id and restart count; None and 0 outside SLURM.
        token: unique id of this lock.
    """

    host: str
    machine: str
    pid: int
    started: str | None
    job: str | None
    restart: int
    token: str

    @classmethod
    def of_this_process(cls) -> Self:
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=_number(os.environ.get("SLURM_RESTART_COUNT")),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class OutputLock:
    """This process's lock on an output folder.

    Attributes:
        lost: message that another run has taken the lock; None while this process holds it.
    """

    def __init__(self, folder: Path):
        self.path, self.mine = folder / FILE_NAME, Holder.of_this_process()
        self.lost: str | None = None
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def take(self) -> None:
        """Take the lock; if a process of another machine holds it, wait until it is known to be alive or ended.

        Raises:
            UserError: another run holds it, or the folder cannot be written to.
        """
        deadline = time.monotonic() + STALE_AFTER + HEARTBEAT
        told = False
        seen: float | None = None
        while not self._created():
            holder, beat = self._read()
            if beat is None:
                continue  # removed in the meantime
            if reason := self._has_ended(holder, beat):
                self._remove_of(holder, reason)
                continue
            alive = holder is not None and self._is_neighbour(holder)
            if alive or (seen is not None and beat != seen) or time.monotonic() > deadline:
                raise UserError(self._refusal(holder))
            seen = beat if seen is None else seen
            if not told:
                say(
                    f"waiting up to {STALE_AFTER:.0f} s: {self.path} says that {holder or 'another process'} trains there"
                )
                told = True
            time.sleep(LOOK_EVERY)
        self._beating = threading.Thread(target=self._beat, name="lock of the output folder", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Remove the lock, if this process still holds it."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
        holder, _ = self._read()
        if holder == self.mine:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _created(self) -> bool:
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if self.path.is_dir():
                raise UserError(
                    f"{self.path} is a folder, and a run locks its output by a file of that name. Move it."
                ) from None
            return False
        except OSError as error:
            raise UserError(f"--output_dir {self.path.parent} is not writable: {error.strerror}.") from error
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self.mine)) + "\n")
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. Free space there, or choose another --output_dir."
            ) from error
        return True

    def _read(self) -> tuple[Holder | None, float | None]:
        return _read(self.path)

    def _has_ended(self, holder: Holder | None, beat: float) -> str | None:
        """Return why the lock may be taken over, or None."""
        if holder is not None:
            if self._is_neighbour(holder):
                started = _started(holder.pid)
                if started is None or started not in (holder.started, UNSEEN):
                    return "it has ended"
                if started != UNSEEN:
                    return None
            if holder.job is not None and holder.job == self.mine.job and holder.restart < self.mine.restart:
                return "SLURM has started its job again"
        silent = self._now_there() - beat
        return f"it has given no sign for {silent:.0f} s" if silent > STALE_AFTER else None

    def _is_neighbour(self, holder: Holder) -> bool:
        return (holder.host, holder.machine) == (self.mine.host, self.mine.machine)

    def _now_there(self) -> float:
        """Return the time by the clock of the folder's file system, which may differ from this machine's."""
        probe = self.path.with_name(f"{FILE_NAME}-{self.mine.token}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)

    def _remove_of(self, holder: Holder | None, reason: str) -> None:
        """Remove the lock of `holder`; put it back if another run took it over in the meantime."""
        aside = self.path.with_name(f"{FILE_NAME}-{self.mine.token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(
                f"{self.path} of {holder or 'another run'} cannot be taken over: {error.strerror}."
            ) from error
        found, _ = _read(aside)
        if found != holder:
            with suppress(OSError):
                os.link(aside, self.path)
        else:
            say(f"lock: taken over from {holder or 'an unknown process'}; {reason}")
        aside.unlink(missing_ok=True)

    def _refusal(self, holder: Holder | None) -> str:
        if holder is None:
            return f"{self.path} is the lock of another run, and does not say whose. Remove it if no run writes there."
        return (
            f"--output_dir {self.path.parent} is in use: {holder} trains there. Wait for it, end it, or choose another "
            "--output_dir."
        )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            holder, _ = self._read()
            if holder == self.mine:
                with suppress(OSError):
                    os.utime(self.path)
            elif holder is not None:
                self.lost = f"{self.path} was taken over by {holder}: this run gave no sign for too long. It saves nothing more."
                say(f"{WARNING}{self.lost}")
                return
            elif not os.path.lexists(self.path):
                with suppress(UserError):
                    self._created()


def _read(path: Path) -> tuple[Holder | None, float | None]:
    """Return a lock's holder (None if the file names none) and last heartbeat (None if there is no lock)."""
    try:
        beat = path.lstat().st_mtime
    except OSError:
        return None, None
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8"))), beat
    except (OSError, ValueError, TypeError):
        return None, beat


def _machine() -> str:
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """Return when a process of this machine started, in kernel ticks; None if it has ended, `UNSEEN` if /proc hides it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:  # no such process, no /proc, or one that hides the processes of other users
        alive = _signalled(pid)
        return alive if alive is None or not os.path.isdir("/proc/self") else UNSEEN
    return None if fields[0] in ("Z", "X") else fields[19]


def _signalled(pid: int) -> str | None:
    """Return "alive", or None if there is no such process; for processes that /proc does not show."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "alive"


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
