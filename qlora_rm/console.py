"""What a run says to the person who started it: once, from the first process of the job."""

import os
import sys
from collections.abc import Iterable, Sequence


def is_main_process() -> bool:
    """Whether this is rank 0 of the job (or the only process), read as launchers set it."""
    return int(os.environ.get("RANK", "0")) == 0


def say(*lines: str) -> None:
    """Print lines to standard error on the main process; standard output is kept for results."""
    if is_main_process():
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table: first column left-aligned, the others right-aligned."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )

    return [line(cells[0]), "  ".join("-" * w for w in widths), *(line(row) for row in cells[1:])]
