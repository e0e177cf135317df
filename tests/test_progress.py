"""Phases: nothing for short ones, a bar on a terminal, occasional lines elsewhere, only from the main process."""

import io
import time
from collections.abc import Callable
from typing import Any

import pytest

from qlora_rm import console, progress
from qlora_rm.progress import Display, Phase, counted, duration, expect


class Stream(io.StringIO):
    """Standard error, a terminal or not."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal  # type: ignore[method-assign]

    @property
    def lines(self) -> list[str]:
        return self.getvalue().splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that lets seconds pass and checks the phases every tenth of a second."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Display, "_watch", lambda *_: None)
    monkeypatch.setattr(progress, "display", Display())

    def wait(seconds: float, every: float = 0.1) -> None:
        until = now[0] + seconds
        while now[0] < until - 1e-9:
            now[0] = min(until, now[0] + every)
            progress.display.look()

    return wait


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Stream]:
    def on(terminal: bool) -> Stream:
        stream = Stream(terminal)
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return on


@pytest.mark.parametrize("terminal", [False, True])
def test_a_phase_within_two_seconds_shows_nothing(clock: Any, shown: Any, terminal: bool) -> None:
    stream = shown(terminal)
    with Phase("tokenizing", 100, "rows") as phase:
        clock(1.9)
        phase.advance(100)
    assert stream.getvalue() == ""


def test_a_pipe_gets_a_line_every_few_seconds(clock: Any, shown: Any) -> None:
    stream = shown(False)
    with Phase("tokenizing", 40_000, "rows") as phase:
        for _ in range(40):
            clock(0.5)
            phase.advance(1000)
    assert "\r" not in stream.getvalue()
    assert stream.lines == [
        "tokenizing: 3,000 of 40,000 rows, 7 %, 25 s left",
        "tokenizing: 13,000 of 40,000 rows, 32 %, 15 s left",
        "tokenizing: 23,000 of 40,000 rows, 57 %, 9 s left",
        "tokenizing: 33,000 of 40,000 rows, 82 %, 4 s left",
        "tokenizing: 40,000 rows in 20 s",
    ]


def test_long_phases_speak_less_often(clock: Any, shown: Any) -> None:
    stream = shown(False)
    with Phase("training", 36_000, "steps") as phase:
        for _ in range(36_000):
            clock(1.0, every=1.0)
            phase.advance()
    assert 1200 <= len(stream.lines) <= 1500
    assert stream.lines[-1] == "training: 36,000 steps in 10 h 0 min"


def test_unknown_totals_and_no_counts_at_all(clock: Any, shown: Any) -> None:
    stream = shown(False)
    with Phase("tokenizing", unit="rows") as phase:
        clock(1)
        phase.advance(512)
        clock(2)
    with Phase("exporting"):
        clock(3)
    assert stream.lines == [
        "tokenizing: 512 rows, 2 s so far",
        "tokenizing: 512 rows in 3 s",
        "exporting: 2 s so far",
        "exporting: 3 s",
    ]


def test_a_phase_resumed_counts_time_left_from_where_it_began(clock: Any, shown: Any) -> None:
    stream = shown(False)
    with Phase("training", 100, "steps", done=90) as phase:
        clock(1)
        phase.done = 95
        clock(1)
    assert stream.lines[0] == "training: 95 of 100 steps, 95 %, 2 s left"


def test_an_error_ends_a_phase_without_a_word(clock: Any, shown: Any) -> None:
    stream = shown(False)
    phase = Phase("merging", 10, "MB").__enter__()
    clock(3)
    phase.__exit__(KeyError, KeyError(), None)
    assert len(stream.lines) == 1
    progress.display.look()
    assert len(stream.lines) == 1, "it is not open any more"


def test_a_terminal_gets_a_bar_that_makes_room_for_what_is_said(clock: Any, shown: Any) -> None:
    stream = shown(True)
    with Phase("merging", 10, "MB") as phase:
        phase.advance(5)
        phase.note = "bf16"
        clock(2.1)
        assert "\r" in stream.getvalue() and "\n" not in stream.getvalue()
        assert "##########  " in stream.getvalue(), "half of 20 columns, in the signs that the stream can write"
        assert "merging: 5 of 10 MB, 50 %, 2 s left; bf16" in stream.getvalue()
        before = len(stream.getvalue())
        console.say("a note")
        cleared, _, after = stream.getvalue()[before:].partition("a note\n")
        assert set(cleared) == {"\r", " "}, "the bar is wiped away first"
        assert "merging: 5 of 10 MB" in after, "and drawn again below"
        phase.advance(5)
        clock(1)
    assert stream.getvalue().endswith("\rmerging: 10 MB in 3 s\n")
    before = len(stream.getvalue())
    console.say("later")
    assert stream.getvalue()[before:] == "later\n"


def test_a_terminal_without_a_width_is_80_wide(clock: Any, shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `docker run -t` or `script` a terminal may report no columns; tqdm then draws nothing."""
    stream = shown(True)
    stream.fileno = lambda: 2
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda _: progress.os.terminal_size((0, 0)))
    with Phase("merging", 10, "MB"):
        clock(3)
    assert "merging: 0 of 10 MB" in stream.getvalue()


def test_without_bars_a_terminal_gets_lines(clock: Any, shown: Any) -> None:
    stream = shown(True)
    progress.display.may_draw = False
    with Phase("training", 10, "steps"):
        clock(3)
    assert "\r" not in stream.getvalue()
    assert stream.lines == ["training: 0 of 10 steps, 0 %", "training: 3 s"]


@pytest.mark.parametrize("variable", [("RANK", "1"), (console.VERBOSITY, "quiet")], ids=lambda item: item[1])
def test_other_ranks_and_quiet_commands_show_nothing(
    clock: Any, shown: Any, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    stream = shown(False)
    monkeypatch.setenv(*variable)
    with Phase("training", 10, "steps"), Phase("evaluating", 3, "batches") as phase:
        expect(4)
        phase.advance()
        clock(30)
    assert stream.getvalue() == ""


def test_a_longer_phase_inside_is_shown_in_its_place(clock: Any, shown: Any) -> None:
    stream = shown(False)
    with Phase("training", 10, "steps") as training:
        training.done = 5
        clock(3)
        with Phase("evaluating", 4, "batches", ends=False) as evaluating:
            clock(1)
            evaluating.advance()
            clock(2)
        clock(6)
    assert stream.lines == [
        "training: 5 of 10 steps, 50 %, 2 s left",
        "evaluating: 1 of 4 batches, 25 %, 6 s left",
        "training: 5 of 10 steps, 50 %, 6 s left",
        "training: 5 of 10 steps, 50 %, 11 s left",
        "training: 5 steps in 12 s",
    ]


def test_a_phase_without_counts_shows_those_of_the_phase_inside(clock: Any, shown: Any) -> None:
    stream = shown(False)
    with Phase("verifying"):
        clock(1)
        with Phase("scoring", 8, "sequences") as scoring:
            scoring.advance(2)
            clock(4)
    assert stream.lines == ["verifying: 2 of 8 sequences, 25 %, 3 s left", "verifying: 5 s"]


def test_what_is_found_out_later_adds_to_the_total(clock: Any, shown: Any) -> None:
    shown(False)
    with Phase("reading", unit="rows") as phase:
        expect(10)
        expect(5)
    assert phase.total == 15
    expect(1)
    assert phase.total == 15


def test_items_are_counted_once_they_are_worked_on(clock: Any, shown: Any) -> None:
    shown(False)
    phase = Phase("hashing", 3, "files")
    assert [(item, phase.done) for item in counted("abc", phase)] == [("a", 0), ("b", 1), ("c", 2)]
    assert phase.done == 3


def test_somebody_looks_while_the_command_works(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown(False)
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0.01)
    monkeypatch.setattr(progress, "LOOK_EVERY", 0.01)
    with Phase("loading"):
        until = time.monotonic() + 10
        while not stream.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert stream.lines[0] == "loading: 0 s so far"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
