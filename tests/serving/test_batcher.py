"""The queue in front of the model: no answer is lost or swapped, whatever fails."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_rm.serving.batcher import Batcher, Closed, QueueFull, ScoringFailed
from qlora_rm.serving.metrics import Metrics
from tests.serving.servers_for_tests import PATIENCE, wait_until

Ids = list[int]
POISON = 13


class Model:
    """Scores a sequence by the sum of its ids, records its batches, and can be blocked."""

    def __init__(self, fits: int = 10**9) -> None:
        self.batches: list[list[Ids]] = []
        self.open = threading.Event()
        self.open.set()
        self.fits = fits

    def __call__(self, sequences: Sequence[Ids]) -> list[float]:
        self.batches.append(list(sequences))
        assert self.open.wait(PATIENCE)
        if sum(map(len, sequences)) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if any(POISON in ids for ids in sequences):
            raise IndexError("index out of range in self")
        return [float(sum(ids)) for ids in sequences]


def make(model: Any, **settings: Any) -> Batcher:
    limits = {"tokens_per_batch": 100, "max_sequences": 50, "max_tokens": 1000, "max_wait": 0.0} | settings
    return Batcher(model, Metrics(), **limits)


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.open.set()


def held(model: Model, batcher: Batcher) -> "Future[list[float]]":
    """Submit a job that keeps the model busy until `model.open` is set."""
    model.open.clear()
    first = batcher.submit([[1]])
    wait_until(lambda: len(model.batches) == 1)
    return first


def test_what_waits_together_is_scored_together(model: Model) -> None:
    batcher = make(model)
    first = held(model, batcher)
    answers = [batcher.submit([[i, i], [i]]) for i in range(1, 10)]
    model.open.set()
    assert first.result(PATIENCE) == [1]
    assert [answer.result(PATIENCE) for answer in answers] == [[2 * i, i] for i in range(1, 10)]
    assert [len(batch) for batch in model.batches] == [1, 18]
    assert batcher.close(PATIENCE)


def test_a_batch_ends_at_its_tokens_but_takes_one_job_at_least(model: Model) -> None:
    batcher = make(model, tokens_per_batch=10)
    held(model, batcher)
    answers = [batcher.submit([[1] * size]) for size in (6, 4, 5, 300, 2)]
    model.open.set()
    assert [answer.result(PATIENCE) for answer in answers] == [[6], [4], [5], [300], [2]]
    assert [[len(ids) for ids in batch] for batch in model.batches[1:]] == [[6, 4], [5, 2], [300]]  # short ones first


def test_a_job_of_many_tokens_is_scored_in_parts_with_short_ones_between(model: Model) -> None:
    batcher = make(model, tokens_per_batch=10)
    held(model, batcher)
    long = batcher.submit([[i] * 4 for i in range(1, 8)])
    model.open.set()
    model.open.clear()
    wait_until(lambda: len(model.batches) >= 2)
    short = batcher.submit([[9]])
    model.open.set()
    assert short.result(PATIENCE) == [9]
    assert long.result(PATIENCE) == [4 * i for i in range(1, 8)]
    assert [len(ids) for batch in model.batches[1:] for ids in batch].index(1) <= 4
    assert all(sum(map(len, batch)) <= 10 for batch in model.batches)


def test_no_client_fills_the_queue_for_the_others(model: Model) -> None:
    batcher = make(model, tokens_per_batch=10, max_tokens=100)
    held(model, batcher)
    flood = [batcher.submit([[1] * 20], "flood") for _ in range(5)]
    with pytest.raises(QueueFull):
        batcher.submit([[1] * 20], "flood")
    other = batcher.submit([[1] * 30], "other")
    model.open.set()
    assert other.result(PATIENCE) == [30]
    assert [answer.exception(PATIENCE).__class__ for answer in flood] == [type(None)] * 3 + [QueueFull] * 2


def test_clients_get_equal_shares(model: Model) -> None:
    batcher = make(model, tokens_per_batch=10)
    held(model, batcher)
    answers = [batcher.submit([[2] * 10], "flood") for _ in range(20)]
    answers += [batcher.submit([[3] * 10], "other") for _ in range(3)]
    model.open.set()
    for answer in answers:
        answer.result(PATIENCE)
    assert [batch[0][0] for batch in model.batches[1:7]].count(3) == 3


def test_an_idle_model_waits_for_what_is_being_read_and_not_else(model: Model) -> None:
    batcher = make(model, max_wait=PATIENCE)
    assert batcher.submit([[1]]).result(PATIENCE / 2) == [1]  # no request is being read
    with batcher.expecting():
        one = batcher.submit([[1]])
        time.sleep(0.05)
        assert not one.done()
        other = batcher.submit([[2]])
    assert (one.result(PATIENCE / 2), other.result(PATIENCE / 2)) == ([1], [2])
    assert len(model.batches) == 2
    batcher = make(model, max_wait=0.05)
    with batcher.expecting():
        assert batcher.submit([[3]]).result(PATIENCE) == [3]  # `max_wait` is over


def test_the_queue_is_bounded_by_sequences_and_tokens(model: Model) -> None:
    batcher = make(model, max_sequences=3, max_tokens=20)
    held(model, batcher)
    waiting = [batcher.submit([[1] * 10, [1] * 5])]
    for sequences in ([[1], [1]], [[1] * 6]):
        with pytest.raises(QueueFull):
            batcher.submit(sequences)
    waiting.append(batcher.submit([[1] * 5]))
    model.open.set()
    assert [answer.result(PATIENCE) for answer in waiting] == [[10, 5], [5]]
    assert batcher.submit([[1]] * 3).result(PATIENCE) == [1] * 3  # there is room again


def test_cancelled_work_is_not_begun(model: Model) -> None:
    batcher = make(model)
    held(model, batcher)
    gone, stays = batcher.submit([[7]]), batcher.submit([[8]])
    assert gone.cancel()
    model.open.set()
    assert stays.result(PATIENCE) == [8]
    assert [7] not in [ids for batch in model.batches for ids in batch]
    last = held(model, batcher) if model.batches.clear() is None else None
    assert batcher.submit([[9]]).cancel()  # a queue with only cancelled work does not end the thread
    model.open.set()
    assert last.result(PATIENCE) == [1]
    assert batcher.submit([[2]]).result(PATIENCE) == [2]


def test_an_error_reaches_only_the_request_it_is_of(model: Model) -> None:
    batcher = make(model)
    held(model, batcher)
    answers = [batcher.submit([[i], [POISON] if i == 5 else [i]]) for i in range(8)]
    model.open.set()
    for i, answer in enumerate(answers):
        if i == 5:
            with pytest.raises(ScoringFailed, match="IndexError: index out of range"):
                answer.result(PATIENCE)
        else:
            assert answer.result(PATIENCE) == [i, i]
    assert batcher.alive


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_out_of_memory_is_tried_again_by_halves(error: Exception) -> None:
    calls = []

    def score(sequences: Sequence[Ids]) -> list[float]:
        calls.append(len(sequences))
        if len(sequences) > 2:
            raise error
        return [float(ids[0]) for ids in sequences]

    batcher = make(score)
    assert batcher.submit([[i] for i in range(7)]).result(PATIENCE) == list(range(7))
    assert calls[0] == 7 and max(calls[-2:]) <= 2
    assert batcher._metrics.failures.labels(kind="out_of_memory")._value.get() > 0


def test_a_sequence_that_never_fits_fails_alone(model: Model) -> None:
    model.fits = 10
    batcher = make(model)
    held(model, batcher)
    large, small = batcher.submit([[1] * 11]), batcher.submit([[1] * 9])
    model.open.set()
    assert small.result(PATIENCE) == [9]
    with pytest.raises(ScoringFailed, match="OutOfMemoryError"):
        large.result(PATIENCE)


def test_closing_finishes_what_waits_and_takes_no_more(model: Model) -> None:
    batcher = make(model)
    held(model, batcher)
    answer = batcher.submit([[4]])
    assert not batcher.close(0)
    with pytest.raises(Closed):
        batcher.submit([[5]])
    model.open.set()
    assert batcher.close(PATIENCE)
    assert answer.result(0) == [4]


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: an illegal memory access"), SystemExit()])
def test_a_dead_model_thread_fails_everything_and_says_so(error: BaseException) -> None:
    entered, go = threading.Event(), threading.Event()

    def score(sequences: Sequence[Ids]) -> list[float]:
        entered.set()
        assert go.wait(PATIENCE)
        raise error

    told = threading.Event()
    batcher = make(score, on_death=told.set)
    first = batcher.submit([[1]])
    assert entered.wait(PATIENCE)
    waiting = batcher.submit([[2]])
    go.set()
    assert told.wait(PATIENCE)
    for answer in (first, waiting):
        with pytest.raises(Closed):
            answer.result(PATIENCE)
    assert batcher.death is error and not batcher.alive
    with pytest.raises(Closed):
        batcher.submit([[1]])


@settings(max_examples=30)
@given(
    jobs=st.lists(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=6), min_size=1, max_size=4), max_size=30),
    budget=st.integers(1, 40),
    fits=st.integers(6, 60),
    wait=st.sampled_from([0.0, 0.002]),
)
def test_no_answer_is_lost_or_crossed(jobs: list[list[Ids]], budget: int, fits: int, wait: float) -> None:
    """Many threads submit at once, memory runs out, and the model fails on some sequences."""
    batcher = make(Model(fits), tokens_per_batch=budget, max_wait=wait, max_sequences=1000, max_tokens=10_000)

    def ask(sequences: list[Ids]) -> Any:
        with batcher.expecting():
            answer = batcher.submit(sequences)
        try:
            return answer.result(PATIENCE)
        except (ScoringFailed, CancelledError) as error:
            return type(error)

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, jobs))
    for sequences, answer in zip(jobs, answers, strict=True):
        poisoned = any(POISON in ids for ids in sequences)
        assert answer == (ScoringFailed if poisoned else [sum(ids) for ids in sequences])
    assert batcher.close(PATIENCE)
