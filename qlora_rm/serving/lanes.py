"""Threads that parse and tokenize requests, apart from the event loop and from the thread that scores.

Short requests have their own threads, so they never wait for long ones. Tokenizers release the interpreter's lock.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from qlora_rm.serving.fair import FairQueue

SHORT = 64 * 1024
"""A request of at most this many bytes of body, or characters to tokenize, is short."""


@dataclass
class _Work:
    run: Callable[[], Any]
    result: "Future[Any]"


class _Lane:
    """Some threads and their queue."""

    def __init__(self, name: str, threads: int) -> None:
        self._waiting = FairQueue[_Work](SHORT)
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"{name} {i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, run: Callable[[], Any], client: str, cost: int) -> "Future[Any]":
        work = _Work(run, Future())
        with self._changed:
            if self._closed:
                work.result.cancel()
            else:
                self._waiting.push(work, client, cost)
                self._changed.notify()
        return work.result

    def close(self, timeout: float) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout)

    def _run(self) -> None:
        while work := self._next():
            if not work.result.set_running_or_notify_cancel():
                continue  # its client has left
            try:
                result = work.run()
            except BaseException as error:  # raised again where the result is awaited
                work.result.set_exception(error)
            else:
                work.result.set_result(result)
            del work  # free it before the next one arrives

    def _next(self) -> _Work | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.pop() if self._waiting else None


class Lanes:
    """A lane for short requests and one for long ones.

    Arguments:
        parallel: whether several threads may use the tokenizer at once; otherwise a lock serializes them.
    """

    def __init__(self, parallel: bool = True) -> None:
        cores = os.cpu_count() or 1
        self._short = _Lane("short requests", max(2, cores // 8))
        self._long = _Lane("long requests", max(1, cores // 8))
        self._lock = None if parallel else threading.Lock()

    def submit(self, run: Callable[[], Any], client: str, cost: int) -> "Future[Any]":
        """Return the future result of `run`, which can be cancelled until it begins.

        Arguments:
            client: the client of the work; clients get equal shares of a lane.
            cost: bytes to parse or characters to tokenize; more than `SHORT` is long.
        """
        lane = self._short if cost <= SHORT else self._long
        return lane.submit(run if self._lock is None else lambda: self._alone(run), client, cost)

    def close(self, timeout: float = 5) -> None:
        """End the threads once their queues are empty. Wait up to `timeout` seconds for each."""
        self._short.close(timeout)
        self._long.close(timeout)

    def _alone(self, run: Callable[[], Any]) -> Any:
        assert self._lock is not None
        with self._lock:
            return run()
