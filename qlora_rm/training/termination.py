"""Handling of SIGTERM, which a scheduler sends before it takes a machine away: save, then end.

transformers 5.23 has an `enable_jit_checkpoint`. There each process decides for itself, three seconds after its own
signal, so two processes may save at different steps. It also waits for a running evaluation to finish.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from qlora_rm.errors import Terminated
from qlora_rm.training.engine import any_process

SAME_SIGNAL = 5.0
"""Seconds within which a repeated SIGTERM counts as the same one: a scheduler may send it to every process of the job,
and the launcher then forwards its own."""


class Termination:
    """Whether this process was asked to end. A second SIGTERM, `SAME_SIGNAL` or more later, ends it at once."""

    def __init__(self) -> None:
        self.asked_at: float | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record SIGTERM inside the block instead of dying from it. Python allows this in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            if self.asked_at is None:  # after SIGTERM this process is already exiting; ignore the launcher's repeat
                signal.signal(signal.SIGTERM, before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif now - self.asked_at >= SAME_SIGNAL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process of the job was asked to end. Collective.

        The signal reaches processes at different moments, but all must save at the same step.
        """
        return any_process(self.asked_at is not None, device)

    def end_if_asked(self, device: torch.device) -> None:
        """Raise `Terminated` if the job was asked to end. Collective."""
        if self.agreed(device):
            raise Terminated


def outlive_sigterm(then: Callable[[int], None] | None, worker: int) -> None:
    """Start a data loader's worker so that SIGTERM ends it only if its main process sent it.

    A scheduler sends SIGTERM to every process of a job. If a worker dies from it, torch 2 raises in the main process,
    in the middle of the last step or save. If workers ignored SIGTERM, a failed run would hang: at exit,
    multiprocessing ends workers by SIGTERM and waits for them.

    Arguments:
        then: the worker's original init function.
    """
    # also keeps it from torch's own handler and from threads started later
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_main, name="SIGTERM of the main process", daemon=True).start()
    if then is not None:
        then(worker)


def _end_with_main() -> None:
    main = multiprocessing.parent_process()
    while main is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)  # torch would report any other status in the main process
