"""Progress of a command's phases: a bar on a terminal, one line every few seconds in a file or a pipe.

A phase that ends within two seconds shows nothing. Only the main process shows phases, and not under --quiet.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from tqdm import tqdm

from qlora_rm import console

SHOWN_AFTER = 2.0
"""Seconds before a phase shows anything."""
LINE_EVERY, LINE_EVERY_AT_MOST = 5.0, 30.0
"""Seconds between two lines. After eight minutes it is a hundredth of the phase's age, up to the second number."""
LOOK_EVERY = 0.2
COLUMNS, ROWS = 80, 24
"""Size of a terminal that reports a size of 0, as under some launchers; tqdm would draw nothing."""

T = TypeVar("T")


class Phase:
    """A part of a command that may take long, open while its `with` block runs.

    Phases may be nested. A phase without a unit shows the counts of the phase inside it under its own name. A phase
    inside one with a unit, such as an evaluation in training, is shown instead of it, unless both have the same name.

    Attributes:
        total: units to do; None if unknown.
        done: units done.
        note: text shown after the counts, such as the loss.
        shown: whether any progress of this phase was shown.
    """

    def __init__(self, name: str, total: float | None = None, unit: str = "", *, done: float = 0, ends: bool = True):
        """Create a phase of `total` units, `done` of them before it begins. `ends`: report its end if it was shown."""
        self.name, self.total, self.unit, self.done, self.ends = name, total, unit, done, ends
        self.note, self.shown = "", False
        self.began = time.monotonic()
        self._done_before = done

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        display.open(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        display.close(self, finished=kind is None)

    @property
    def age(self) -> float:
        """Seconds since the phase began."""
        return time.monotonic() - self.began

    def advance(self, count: float = 1) -> None:
        self.done += count

    def counts(self) -> str:
        """Return `12,000 of 40,000 rows, 30 %, 8 s left`, as far as this is known."""
        if self.total is None:
            parts = [f"{self.done:,.0f} {self.unit}"] if self.unit and self.done else []
            return ", ".join([*parts, f"{duration(self.age)} so far"])
        share = min(1.0, self.done / self.total) if self.total else 1.0
        parts = [f"{self.done:,.0f} of {self.total:,.0f} {self.unit}", f"{int(100 * share)} %"]
        if (fresh := self.done - self._done_before) > 0:
            parts.append(f"{duration(self.age / fresh * max(0, self.total - self.done))} left")
        return ", ".join(parts)

    def summary(self) -> str:
        """Return the phase's name, amount and duration as one line."""
        amount = f"{self.done:,.0f} {self.unit} in " if self.unit and self.done else ""
        return f"{self.name}: {amount}{duration(self.age)}"


def duration(seconds: float) -> str:
    """Format seconds as `8 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def counted(items: Iterable[T], phase: Phase) -> Iterator[T]:
    """Yield the items and advance `phase` after each has been processed."""
    with phase:
        for item in items:
            yield item
            phase.advance()


def expect(more: float) -> None:
    """Add to the total of the innermost open phase, for code that discovers the amount of work."""
    display.expect(more)


class _Bar(tqdm):
    monitor_interval = 0  # our own thread suffices


_Bar.set_lock(threading.RLock())  # tqdm's default lock is shared between processes, and starts one


class Display:
    """The open phases, innermost last, and the thread that shows them.

    Attributes:
        may_draw: whether to draw bars on a terminal; False prints lines (`--disable_tqdm`).
    """

    def __init__(self) -> None:
        self.may_draw = True
        self._open: list[Phase] = []
        self._lock = threading.RLock()
        self._bar: Any = None
        self._line_of: Phase | None = None
        self._line_at = 0.0
        self._stop = threading.Event()

    def open(self, phase: Phase) -> None:
        if not console.is_main_process() or console.verbosity() == "quiet":
            return
        with self._lock:
            self._open.append(phase)
            if len(self._open) == 1:
                self._stop = threading.Event()
                threading.Thread(target=self._watch, args=(self._stop,), name="progress", daemon=True).start()

    def close(self, phase: Phase, finished: bool) -> None:
        with self._lock:
            if phase not in self._open:
                return
            self._open.remove(phase)
            if not self._open:
                self._stop.set()
            self._erase()
        if phase.shown and finished and phase.ends:
            console.say(phase.summary())

    def expect(self, more: float) -> None:
        with self._lock:
            if self._open:
                self._open[-1].total = (self._open[-1].total or 0) + more

    def look(self) -> None:
        """Draw a bar or write a line if one is due."""
        with self._lock:
            phase = self._due()
            if phase is None:
                return
            phase.shown = True
            counting = self._counting(phase)
            text = f"{phase.name}: {counting.counts()}" + (f"; {phase.note}" if phase.note else "")
            if self.may_draw and sys.stderr.isatty():
                self._draw(counting, text)
            else:
                self._write(phase, text)

    def _due(self) -> Phase | None:
        """Return the innermost phase that is old enough and whose enclosing phases all have units and other names."""
        due = outer = None
        for phase in self._open:
            if outer is not None and (not outer.unit or outer.name == phase.name):
                break
            if phase.age >= SHOWN_AFTER:
                due = phase
            outer = phase
        return due

    def _counting(self, phase: Phase) -> Phase:
        """Return the phase whose counts to show for `phase`."""
        inside = self._open[self._open.index(phase) :]
        return phase if phase.unit else next((inner for inner in inside if inner.unit), phase)

    def _draw(self, phase: Phase, text: str) -> None:
        if self._bar is None:
            self._bar = _Bar(
                file=sys.stderr, leave=False, disable=False, bar_format="{desc}", ncols=_columns(), nrows=ROWS
            )
            console.write_by(lambda words: _Bar.write(words, file=sys.stderr))
        self._bar.bar_format = "{bar:20} {desc}" if phase.total else "{desc}"
        self._bar.ncols = _columns()
        self._bar.total, self._bar.n = phase.total, min(phase.done, phase.total or phase.done)
        self._bar.set_description_str(text)

    def _erase(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            console.write_by(None)

    def _write(self, phase: Phase, text: str) -> None:
        now = time.monotonic()
        pause = min(LINE_EVERY_AT_MOST, max(LINE_EVERY, phase.age / 100))
        if phase is not self._line_of or now - self._line_at >= pause:
            self._line_of, self._line_at = phase, now
            console.say(text)

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(LOOK_EVERY):
            self.look()


def _columns() -> int:
    """Return the terminal's current width."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        return COLUMNS


display = Display()
