"""What a command says to the person who started it: once, from the first process of the job."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from qlora_rm.errors import UserError

VERBOSITY = "QLORA_RM_VERBOSITY"
"""Environment variable: quiet, normal or verbose. Processes that a command starts inherit it."""
LEVELS = ("quiet", "normal", "verbose")
WARNING = "warning: "

COMMANDS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
"""Characters that a terminal obeys instead of showing them, or that it cannot show: control characters, changes of the writing
direction, half characters, invisible tags."""
OF_LINES = {"\n", "\t"}

_write: Callable[[str], None] | None = None


def is_main_process() -> bool:
    """Whether this is rank 0 of the job (or the only process), read as launchers set it."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_prefix() -> str:
    """What tells the lines of other processes from those of the main one."""
    return "" if is_main_process() else f"[rank {os.environ['RANK']}] "


def verbosity() -> str:
    """quiet, normal or verbose."""
    level = os.environ.get(VERBOSITY, "normal")
    return level if level in LEVELS else "normal"


@contextmanager
def speaking(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Inside the block, and in processes started there, be quiet or verbose; with neither, as before.

    Raises:
        UserError: both are asked for.
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

    Standard output is kept for results.
    """
    told = [line for line in lines if verbosity() != "quiet" or line.startswith(WARNING)]
    if told:
        say_result(*told)


def say_result(*lines: str) -> None:
    """Print lines to standard error on the main process, under --quiet too."""
    if is_main_process():
        (_write or _print)(printable("\n".join(lines), lines=True))


def write_by(write: Callable[[str], None] | None) -> None:
    """Let `write` print what is said, for as long as something else stands on the terminal's last line; None: as usual."""
    global _write
    _write = write


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")  # in one piece: several threads may have something to say
    sys.stderr.flush()


def printable(text: object, lines: bool = False) -> str:
    """`text` as a terminal may be given it: what was read from servers or from files of others must not command it.

    Arguments:
        lines: whether line breaks and tabs are kept.
    """
    return COMMANDS.sub(
        lambda found: found[0] if lines and found[0] in OF_LINES else found[0].encode("unicode_escape").decode(),
        str(text),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table: first column left-aligned, the others right-aligned."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )

    return [line(cells[0]), "  ".join("-" * w for w in widths), *(line(row) for row in cells[1:])]
