"""Ends all ranks of a job together after a failure, and shows the error of the rank that failed first.

A rank that fails leaves the others waiting in a collective, and no backend reports the cause: gloo aborts with a
message about sockets, NCCL may wait for `--ddp_timeout`. torch's launcher ends the ranks of its own host within a
second, but not those of other hosts. So the first rank to fail writes its error to the job's own key-value store,
through which the process group is set up. Every rank checks the store once a second, and ends with one line that names
the failed rank.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch

from qlora_rm.console import is_main_process, printable, rank_prefix
from qlora_rm.errors import Terminated, UserError, first_line

LOOK_EVERY = 1.0
"""Seconds between two checks of the store."""
COME_OUT = 5.0
"""How long a rank may take to leave a blocking call after another rank fails, in seconds. A rank whose collective was
aborted waits as long for the cause to appear in the store."""
LINGER = 3.0
"""Seconds that a rank waits before it ends after another's failure, so that its launcher sees the other end first."""
JOIN = timedelta(minutes=10)
"""How long to wait for rank 0's store: hosts that load an uncached environment over a network start minutes apart."""


@dataclass(frozen=True)
class Failure:
    """Why a rank ended."""

    rank: int
    host: str
    message: str
    is_mistake: bool
    """Whether it is a `UserError`, whose message is sufficient; otherwise that rank's own output holds a traceback."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@contextmanager
def ending_together() -> Iterator[None]:
    """Wrap all of a rank's work: an error inside the block ends this process with its exit status, and all other ranks.

    A process that is alone in its job raises as usual. Interrupts pass through: the launcher sends them to every rank.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        with _recorded():
            yield
        return
    board = Board()
    watch = threading.Thread(target=_watch, args=(board,), name="failures of other ranks", daemon=True)
    watch.start()
    try:
        yield
    except Terminated:  # all ranks agreed on it, so none is left waiting
        raise
    except Exception as error:
        _end(error, board)
    finally:
        board.closed.set()


class Board:
    """The entry in the job's store that records the first failure.

    torch's launcher hosts the store. Under plain `srun` rank 0 does, and torch's process group then shares it.
    """

    def __init__(self) -> None:
        self.rank, self.host = int(os.environ["RANK"]), socket.gethostname()
        self.closed = threading.Event()
        self.known: Failure | None = None
        # a launcher that restarts its ranks keeps the store
        self._key = f"qlora_rm/first_failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        launcher_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            self._store = torch.distributed.TCPStore(
                address,
                port,
                is_master=self.rank == 0 and not launcher_hosts,
                timeout=JOIN,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except torch.distributed.DistError as error:
            raise UserError(
                f"Rank 0 cannot be reached from {self.host} at {address}:{port} (MASTER_ADDR, MASTER_PORT): "
                f"{first_line(error)}"
            ) from error

    def post(self, error: Exception) -> Failure:
        """Record this rank's error unless another rank's is already recorded; return the recorded one."""
        mine = Failure(self.rank, self.host, str(error) or type(error).__name__, isinstance(error, UserError))
        standing = self._store.compare_set(self._key, "", json.dumps(asdict(mine)))
        return Failure(**json.loads(standing))

    def first(self, within: float = 0.0) -> Failure | None:
        """Return the job's first failure, waiting up to `within` seconds for one; keep it in `known`."""
        until = time.monotonic() + within
        while self.known is None:
            if self._store.check([self._key]):
                self.known = Failure(**json.loads(self._store.get(self._key)))
            elif time.monotonic() >= until:
                break
            else:
                time.sleep(0.1)
        return self.known


def lost_the_others(error: BaseException | None) -> bool:
    """Whether a collective was aborted, mostly because another rank failed. gloo raises a plain RuntimeError."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, torch.distributed.DistError) or (
            isinstance(error, RuntimeError) and "/gloo/" in str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _watch(board: Board) -> None:
    """End this process after another rank has failed, whatever call the main thread is blocked in."""
    while not board.closed.wait(LOOK_EVERY):
        try:
            first = board.first()
        except torch.distributed.DistError:
            if board.closed.wait(COME_OUT):  # the job is over, and the store's host left first
                return
            _leave(1, f"{_who(board)} ended: the host of the job's store is gone, and rank 0 or its launcher with it")
        if first is not None and not board.closed.wait(COME_OUT):
            _leave(1, _because(board, first))


def _end(error: Exception, board: Board) -> NoReturn:
    """Report the job's first failure once, in full if it is this rank's own, and exit."""
    board.closed.set()
    try:
        first = _cause(error, board)
    except torch.distributed.DistError:  # the store ended with its host
        first = board.known
    if first is None:
        cause = "a process killed (out of memory?), a host or a network that is down"
        text = f"{_who(board)} lost the other ranks, and none of them says why: {cause}. {error}"
        _leave(1, text, record="".join(traceback.format_exception(error)))
    if first.rank != board.rank:
        told = first.is_mistake and first.message == str(error)
        own = (
            "" if told or lost_the_others(error) else f"; its own error was {type(error).__name__}: {first_line(error)}"
        )
        _leave(2 if told else 1, "" if told else _because(board, first) + own, record=_because(board, first))
    if isinstance(error, UserError):
        print(f"{rank_prefix()}error: {printable(error, lines=True)}", file=sys.stderr)
    else:
        print(f"{_who(board)} failed:", file=sys.stderr)
        sys.excepthook(type(error), error, error.__traceback__)
    _record(first.message if first.is_mistake else "".join(traceback.format_exception(error)))
    sys.stderr.flush()
    time.sleep(2 * LOOK_EVERY)  # the store may end with this rank or its launcher: let every rank read it first
    _exit(2 if first.is_mistake else 1)


def _cause(error: Exception, board: Board) -> Failure | None:
    if lost_the_others(error):
        return board.first(within=COME_OUT)
    if isinstance(error, UserError) and not is_main_process():
        board.first(within=1.0)  # rank 0 reports a mistake that all ranks find
    return board.post(error)


def _who(board: Board) -> str:
    return f"[rank {board.rank} on {board.host}]"


def _because(board: Board, first: Failure) -> str:
    return f"{_who(board)} ended because {first} failed: {first_line(Exception(first.message))}"


def _leave(status: int, line: str, record: str = "") -> NoReturn:
    """End after another rank's failure, with one line, and later than that rank, which the launcher then reports."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # this host's launcher may end this process meanwhile
    if line:
        print(line, file=sys.stderr, flush=True)
    time.sleep(LINGER)
    _record(record or line)
    _exit(status)


def _exit(status: int) -> NoReturn:
    """Exit without the interpreter's shutdown, in which process groups and engines would wait for ended ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def _recorded() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _record(str(error) if isinstance(error, UserError) else traceback.format_exc())
        raise


def _record(message: str) -> None:
    """Write the reason that torch's launcher prints in its final summary; it takes the earliest one."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")


def leave_process_group() -> None:
    """Destroy the process group; a rank that exits while others communicate aborts (seen in 1 of 5 two-rank runs)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
