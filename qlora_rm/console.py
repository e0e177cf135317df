"""Messages of a command to its user, printed once, by the job's main process."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from qlora_rm.errors import UserError

VERBOSITY = "QLORA_RM_VERBOSITY"
"""Environment variable: quiet, normal or verbose. Child processes inherit it."""
LEVELS = ("quiet", "normal", "verbose")
WARNING = "warning: "

COMMANDS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that a terminal interprets or cannot show: control characters, changes of the writing direction, lone
surrogates, invisible tags."""
OF_LINES = {"\n", "\t"}

_write: Callable[[str], None] | None = None


def is_main_process() -> bool:
    """Return whether this is rank 0 of the job, or its only process, from the variable RANK that launchers set."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_prefix() -> str:
    """Return the prefix that marks the lines of processes other than the main one."""
    return "" if is_main_process() else f"[rank {os.environ['RANK']}] "


def verbosity() -> str:
    """Return quiet, normal or verbose."""
    level = os.environ.get(VERBOSITY, "normal")
    return level if level in LEVELS else "normal"


@contextmanager
def speaking(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Set the verbosity inside the block and in processes started there; with neither option, leave it unchanged.

    Raises:
        UserError: both options are given.
    """
    if quiet and verbose:
        raise UserError("Give --quiet or --verbose, not both.")
    before = os.environ.get(VERBOSITY)
    if quiet or verbose:
        os.environ[VERBOSITY] = "quiet" if quiet else "verbose"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VERBOSITY, None)
        else:
            os.environ[VERBOSITY] = before


def say(*lines: str) -> None:
    """Print lines to standard error on the main process; under --quiet only those that begin with `warning: `.

    Standard output is for results only.
    """
    told = [line for line in lines if verbosity() != "quiet" or line.startswith(WARNING)]
    if told:
        say_result(*told)


def say_result(*lines: str) -> None:
    """Print lines to standard error on the main process, under --quiet too."""
    if is_main_process():
        (_write or _print)(printable("\n".join(lines), lines=True))


def write_by(write: Callable[[str], None] | None) -> None:
    """Print messages through `write` while a progress bar is on the terminal's last line; None restores the default."""
    global _write
    _write = write


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")  # one call, since several threads may print
    sys.stderr.flush()


def printable(text: object, lines: bool = False) -> str:
    """Escape the characters that control a terminal: text from servers and foreign files must not reach it unescaped.

    Arguments:
        lines: whether to keep line breaks and tabs.
    """
    return COMMANDS.sub(
        lambda found: found[0] if lines and found[0] in OF_LINES else found[0].encode("unicode_escape").decode(),
        str(text),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a plain-text table: first column left-aligned, the others right-aligned."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )

    return [line(cells[0]), "  ".join("-" * w for w in widths), *(line(row) for row in cells[1:])]
