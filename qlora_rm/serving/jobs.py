"""Jobs for the model: a request's sequences, and the part of them that one batch scores."""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

Ids = list[int]


@dataclass
class Job:
    """A request's sequences, their client, and the future for their scores.

    Attributes:
        client: requests of one client share that client's part of the model's time.
        begun: whether a part was taken for scoring.
        scores: scores so far, in the order of the sequences.
    """

    sequences: list[Ids]
    client: str = ""
    answer: "Future[list[float]]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    begun: bool = False
    scores: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = sum(map(len, self.sequences))

    def fail(self, error: Exception) -> None:
        """Set the error as the result, unless the answer is done or cancelled."""
        if not self.answer.done() and self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


@dataclass(frozen=True)
class Part:
    """The next sequences of a job: all of them, or as many as one batch holds."""

    job: Job
    sequences: list[Ids]
    tokens: int

    def scored(self, scores: list[float]) -> None:
        """Keep the scores. After the last part, answer the request."""
        job = self.job
        job.scores += scores
        complete = len(job.scores) == len(job.sequences)
        if complete and not job.answer.done() and job.answer.set_running_or_notify_cancel():
            job.answer.set_result(job.scores)
