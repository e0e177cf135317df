"""One thread owns the model. Requests queue for it, and those that wait together are scored together."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from qlora_rm.serve.metrics import Metrics

Ids = list[int]


class QueueFull(Exception):
    """There is no room now; there will be."""


class Closed(Exception):
    """No more work is taken: the server stops, or the model thread has died."""


class ScoringFailed(Exception):
    """The model raised on this request's own sequences."""


@dataclass
class Job:
    """A request's sequences, how many tokens they are, and where their scores go."""

    sequences: list[Ids]
    answer: "Future[list[float]]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.tokens = sum(map(len, self.sequences))


class Batcher:
    """A bounded queue in front of `score`, which is only ever called from one thread.

    Arguments:
        score: from S token sequences to their S scores.
        tokens_per_batch: jobs are taken from the queue, oldest first, up to this many tokens (one at least).
        max_sequences, max_tokens: bounds of what may wait.
        max_wait: seconds a job may wait, with the model idle, for requests that are just being read; 0 for none.
        on_death: called from the model thread when it ends by an error, after everything that waited was failed.
    """

    def __init__(
        self,
        score: Callable[[Sequence[Ids]], Sequence[float]],
        metrics: Metrics,
        *,
        tokens_per_batch: int,
        max_sequences: int,
        max_tokens: int,
        max_wait: float,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._score, self._metrics, self.on_death = score, metrics, on_death
        self._tokens_per_batch, self._max_wait = tokens_per_batch, max_wait
        self.max_sequences, self.max_tokens = max_sequences, max_tokens
        self._waiting: deque[Job] = deque()
        self._sequences = self._tokens = self._expected = 0
        self._changed = threading.Condition()
        self._closed = False
        self.death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # ---- from the threads that serve requests --------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether work is taken."""
        return not self._closed

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """While a request is being read: an idle model waits a moment for it (see `max_wait`)."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify()

    def submit(self, sequences: list[Ids]) -> "Future[list[float]]":
        """Queue sequences to be scored; the answer can be cancelled until they are begun.

        Raises:
            QueueFull: they would exceed what may wait.
            Closed: there is nobody to score them.
        """
        job = Job(sequences)
        with self._changed:
            if self._closed:
                raise Closed
            if self._sequences + len(sequences) > self.max_sequences or self._tokens + job.tokens > self.max_tokens:
                raise QueueFull
            self._waiting.append(job)
            self._count(job, 1)
            self._changed.notify()
        return job.answer

    def close(self, timeout: float) -> bool:
        """Take no more work, finish what is waiting, and say whether that was done in `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- the model thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        jobs: list[Job] = []
        try:
            while jobs := self._next():
                self._answer(jobs)
        except BaseException as error:  # nobody else sees what ends a thread
            self._die(error, jobs)

    def _die(self, error: BaseException, begun: list[Job]) -> None:
        """Leave nobody waiting, then tell."""
        with self._changed:
            self._closed, self.death = True, error
            waiting = list(self._waiting)
            self._waiting.clear()
        begun = [job for job in begun if not job.answer.done()]
        for job in begun + [job for job in waiting if job.answer.set_running_or_notify_cancel()]:
            job.answer.set_exception(Closed())
        self.on_death()

    def _next(self) -> list[Job]:
        """Jobs to score together; none when the queue is closed and empty."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                self._let_others_come()
                if jobs := self._taken():  # none where all were cancelled
                    return jobs

    def _let_others_come(self) -> None:
        end = self._waiting[0].arrived + self._max_wait  # long past for what came while the model was busy
        while self._expected and not self._closed and self._tokens < self._tokens_per_batch:
            left = end - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _taken(self) -> list[Job]:
        jobs: list[Job] = []
        tokens = 0
        while self._waiting and (not jobs or tokens + self._waiting[0].tokens <= self._tokens_per_batch):
            job = self._waiting.popleft()
            self._count(job, -1)
            if job.answer.set_running_or_notify_cancel():
                jobs.append(job)
                tokens += job.tokens
        return jobs

    def _count(self, job: Job, sign: int) -> None:
        self._sequences += sign * len(job.sequences)
        self._tokens += sign * job.tokens
        self._metrics.queued_sequences.set(self._sequences)
        self._metrics.queued_tokens.set(self._tokens)

    def _answer(self, jobs: list[Job]) -> None:
        """Score jobs together; an error is looked for by halves, so that it is told to none but the request it is of."""
        try:
            scores = self._scored(jobs)
        except torch.AcceleratorError:  # a CUDA context that has failed once fails for ever: the thread ends
            raise
        except Exception as error:
            failure = ScoringFailed(f"{type(error).__name__}: {error}")
        else:
            for job in jobs:
                job.answer.set_result([next(scores) for _ in job.sequences])
            return
        if len(jobs) == 1:
            self._metrics.failures.labels(kind="scoring").inc()
            jobs[0].answer.set_exception(failure)
            return
        middle = len(jobs) // 2
        self._answer(jobs[:middle])
        self._answer(jobs[middle:])

    def _scored(self, jobs: list[Job]) -> Iterator[float]:
        sequences = [ids for job in jobs for ids in job.sequences]
        began = time.perf_counter()
        scores = self._in_memory(sequences)
        self._metrics.batch_seconds.observe(time.perf_counter() - began)
        self._metrics.batch_requests.observe(len(jobs))
        self._metrics.batch_sequences.observe(len(sequences))
        self._metrics.asked.inc(sum(job.tokens for job in jobs))
        return iter(scores)

    def _in_memory(self, sequences: Sequence[Ids]) -> list[float]:
        """Scores; where memory runs out, of the halves one after the other."""
        try:
            return list(self._score(sequences))
        except Exception as error:
            if not _out_of_memory(error) or len(sequences) == 1:
                raise
        self._metrics.failures.labels(kind="out_of_memory").inc()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(sequences) // 2
        return self._in_memory(sequences[:middle]) + self._in_memory(sequences[middle:])


def _out_of_memory(error: Exception) -> bool:
    """On a CPU torch raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
