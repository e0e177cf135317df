"""SIGTERM, as a scheduler sends it before it takes a machine away: save, then end.

transformers 5.23 has an `enable_jit_checkpoint`; each process decides there for itself, three seconds after its own
signal, so that two may save at different steps, and an evaluation is waited for.
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
"""Seconds within which another SIGTERM is the same one: a scheduler may send it to every process of the job, and the
launcher then passes on its own."""


class Termination:
    """Whether this process was told to end; a second SIGTERM, `SAME_SIGNAL` or more after the first, ends it at once."""

    def __init__(self) -> None:
        self.asked_at: float | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note SIGTERM instead of dying of it, inside the block. Python allows this in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            if self.asked_at is None:  # who was told is on the way out, and is not to die of the launcher's own SIGTERM
                signal.signal(signal.SIGTERM, before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
        elif now - self.asked_at >= SAME_SIGNAL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process of the job was told to end: the signal reaches each at another moment, and all must save
        at the same step. Collective."""
        return any_process(self.asked_at is not None, device)

    def end_if_asked(self, device: torch.device) -> None:
        """Raise `Terminated` where the job was told to end. Collective."""
        if self.agreed(device):
            raise Terminated


def outlive_sigterm(then: Callable[[int], None] | None, worker: int) -> None:
    """The start of a data loader's worker: SIGTERM ends it only where its main process sends it.

    A scheduler sends it to every process of a job. A worker that dies of it has torch 2 raise in the main process, in the
    middle of the step or of the save that should be the last. Ignored outright, it would leave a failed run waiting for ever:
    multiprocessing ends workers by SIGTERM on its way out, and waits for them.

    Arguments:
        then: what the worker would have started with.
    """
    # for torch's own handler, and threads started from now on
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_main, name="SIGTERM of the main process", daemon=True).start()
    if then is not None:
        then(worker)


def _end_with_main() -> None:
    main = multiprocessing.parent_process()
    while main is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)  # any other status torch would report in the main process
