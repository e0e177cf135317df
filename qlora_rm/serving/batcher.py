"""Run the model in one thread. Requests queue for it, and those in the queue are scored together."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from qlora_rm.serving.fair import FairQueue
from qlora_rm.serving.jobs import Ids, Job, Part
from qlora_rm.serving.metrics import Metrics


class QueueFull(Exception):
    """The queue has no room now. A later try may succeed."""


class Closed(Exception):
    """No more work is accepted: the server is stopping, or the model thread has died."""


class ScoringFailed(Exception):
    """The model raised on this request's own sequences."""


class Batcher:
    """A bounded queue in front of `score`, which only one thread ever calls.

    Arguments:
        score: maps S token sequences to their S scores.
        tokens_per_batch: the most tokens taken from the queue for one batch (but at least one sequence). A job of more
            tokens is scored in parts, and short jobs that arrive meanwhile go between the parts.
        max_sequences, max_tokens: limits of the queue. When it is full, a client with less queued work displaces the last
            job of the client with the most.
        max_wait: seconds a job may wait, with the model idle, for requests that are being read; 0 for none.
        on_death: called from the model thread when an error ends it, after all queued jobs have failed.
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
        self._waiting = FairQueue[Job](tokens_per_batch)
        self._sequences = self._tokens = self._expected = 0
        self._changed = threading.Condition()
        self._closed = False
        self.death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # ---- from the threads that serve requests --------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Return whether work is accepted."""
        return not self._closed

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Mark that a request is being read, for which an idle model waits up to `max_wait`."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify()

    def submit(self, sequences: list[Ids], client: str = "") -> "Future[list[float]]":
        """Queue sequences to be scored. After the answer is cancelled, no further part of them begins.

        Raises:
            QueueFull: they exceed the limits of the queue. The answer of a displaced job raises it too.
            Closed: no more work is accepted.
        """
        job = Job(sequences, client)
        with self._changed:
            if self._closed:
                raise Closed
            removed = self._make_room(job)
            self._waiting.push(job, client, job.tokens)
            self._count(job, 1)
            self._changed.notify()
        for other in removed:  # outside the lock, because a future's callbacks run here
            other.fail(QueueFull())
        return job.answer

    def _make_room(self, job: Job) -> list[Job]:
        """Remove the last jobs of the client with the most queued tokens, while it has more than the client of `job`.

        Raises:
            QueueFull: this does not free enough room.
        """
        sequences_over = self._sequences + len(job.sequences) - self.max_sequences
        tokens_over = self._tokens + job.tokens - self.max_tokens
        if sequences_over <= 0 and tokens_over <= 0:
            return []
        waiting = [other for other in self._waiting if not other.begun]
        removed: list[Job] = []
        tokens: dict[str, int] = {}
        for other in waiting:
            tokens[other.client] = tokens.get(other.client, 0) + other.tokens
        own = tokens.get(job.client, 0) + job.tokens
        while sequences_over > 0 or tokens_over > 0:
            largest = max(tokens, key=tokens.__getitem__, default=job.client)
            if largest == job.client or tokens[largest] <= own:
                raise QueueFull
            last = max((other for other in waiting if other.client == largest), key=lambda other: other.arrived)
            waiting.remove(last)
            removed.append(last)
            tokens[largest] -= last.tokens
            sequences_over -= len(last.sequences)
            tokens_over -= last.tokens
        for other in removed:
            self._waiting.remove(other)
            self._count(other, -1)
        return removed

    def close(self, timeout: float) -> bool:
        """Accept no more work and finish the queue. Return whether that took at most `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- the model thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        parts: list[Part] = []
        try:
            while parts := self._next():
                self._answer(parts)
        except BaseException as error:  # nothing else reports what ends a thread
            self._die(error, parts)

    def _die(self, error: BaseException, begun: list[Part]) -> None:
        """Fail all jobs, then call `on_death`."""
        with self._changed:
            self._closed, self.death = True, error
            waiting = list(self._waiting)
            self._waiting.clear()
        for job in [part.job for part in begun] + waiting:
            job.fail(Closed())
        self.on_death()

    def _next(self) -> list[Part]:
        """Wait for parts to score together. Return none when the queue is closed and empty."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                self._let_others_come()
                if parts := self._taken():  # empty where all were cancelled
                    return parts

    def _let_others_come(self) -> None:
        end = self._waiting.peek().arrived + self._max_wait  # already past for jobs that came while the model was busy
        while self._expected and not self._closed and self._tokens < self._tokens_per_batch:
            left = end - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _taken(self) -> list[Part]:
        parts: list[Part] = []
        room = self._tokens_per_batch
        while self._waiting:
            job = self._waiting.peek()
            if job.answer.done():  # cancelled, or one of its parts has failed
                self._waiting.serve(0)
            elif part := self._part_of(job, room, alone=not parts):
                parts.append(part)
                room -= part.tokens
            else:
                break
            if not job.begun:
                job.begun = True
                self._count(job, -1)
            if parts and parts[-1].job is job and len(job.scores) + len(parts[-1].sequences) < len(job.sequences):
                break  # the batch is full
        return parts

    def _part_of(self, job: Job, room: int, alone: bool) -> Part | None:
        """Return the job's next sequences for a batch with room for `room` tokens, or None if they must wait for another."""
        first = len(job.scores)
        rest = job.tokens if not first else sum(map(len, job.sequences[first:]))
        if rest > room and not alone:
            return None
        end, tokens = first, 0
        while end < len(job.sequences) and (end == first or tokens + len(job.sequences[end]) <= room):
            tokens += len(job.sequences[end])
            end += 1
        self._waiting.serve(tokens, stays=end < len(job.sequences))
        return Part(job, job.sequences[first:end], tokens)

    def _count(self, job: Job, sign: int) -> None:
        self._sequences += sign * len(job.sequences)
        self._tokens += sign * job.tokens
        self._metrics.queued_sequences.set(self._sequences)
        self._metrics.queued_tokens.set(self._tokens)

    def _answer(self, parts: list[Part]) -> None:
        """Score parts together. After an error, retry in halves, so that only the request that caused it fails."""
        try:
            scores = self._scored(parts)
        except torch.AcceleratorError:  # a failed CUDA context never recovers, so the thread ends
            raise
        except Exception as error:
            failure = ScoringFailed(f"{type(error).__name__}: {error}")
        else:
            for part in parts:
                part.scored([next(scores) for _ in part.sequences])
            return
        if len(parts) == 1:
            self._metrics.failures.labels(kind="scoring").inc()
            parts[0].job.fail(failure)
            return
        middle = len(parts) // 2
        self._answer(parts[:middle])
        self._answer(parts[middle:])

    def _scored(self, parts: list[Part]) -> Iterator[float]:
        sequences = [ids for part in parts for ids in part.sequences]
        began = time.perf_counter()
        scores = self._in_memory(sequences)
        self._metrics.batch_seconds.observe(time.perf_counter() - began)
        self._metrics.batch_requests.observe(len(parts))
        self._metrics.batch_sequences.observe(len(sequences))
        self._metrics.asked.inc(sum(part.tokens for part in parts))
        return iter(scores)

    def _in_memory(self, sequences: Sequence[Ids]) -> list[float]:
        """Return scores. When memory runs out, score the two halves one after the other."""
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
