"""The server's Prometheus metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from torch import nn

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SCORES = (-10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10)


class Metrics:
    """Metrics in their own registry, so that several servers can run in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        here: dict[str, Any] = {"namespace": "qlora_rm", "registry": self.registry}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **here)
        self.seconds = Histogram("request_seconds", "From a request to its answer.", ["path"], buckets=SECONDS, **here)
        self.abandoned = Counter("abandoned", "Requests whose client left before the answer.", **here)
        self.queued_sequences = Gauge("queued_sequences", "Sequences that wait for the model.", **here)
        self.queued_tokens = Gauge("queued_tokens", "Tokens that wait for the model.", **here)
        self.batch_requests = Histogram("batch_requests", "Requests scored together.", buckets=SEQUENCES, **here)
        self.batch_sequences = Histogram("batch_sequences", "Sequences scored together.", buckets=SEQUENCES, **here)
        self.batch_seconds = Histogram("batch_seconds", "Of the model, for one batch.", buckets=SECONDS, **here)
        self.asked = Counter("tokens_asked", "Tokens of the sequences to score, shared beginnings each time.", **here)
        self.computed = Counter("tokens_computed", "Tokens the model computed, padding among them.", **here)
        self.scores = Histogram("score", "Scores given; sum over count is their mean.", buckets=SCORES, **here)
        self.failures = Counter("failures", "Errors of the model.", ["kind"], **here)

    def count_tokens_of(self, model: nn.Module) -> None:
        """Count the tokens that the model computes from now on: fewer than requested where prompts are shared."""

        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.computed.inc(kwargs["input_ids"].numel())

        model.register_forward_pre_hook(count, with_kwargs=True)

    def text(self) -> bytes:
        """Return the metrics in the exposition format, the answer to `GET /metrics`."""
        return generate_latest(self.registry)
