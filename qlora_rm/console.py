"""What a run says to the person who started it: once, from the first process of the job."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence


def is_main_process() -> bool:
    """Whether this is rank 0 of the job (or the only process), read as launchers set it."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_prefix() -> str:
    """What tells the lines of other processes from those of the main one."""
    return "" if is_main_process() else f"[rank {os.environ['RANK']}] "


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


def quiet_libraries() -> None:
    """Silence notices of libraries that ask nothing of the user; to be called before the libraries are imported.

    Each goes when its library stops saying it: PEFT and TRL calling what transformers 5 has renamed, DeepSpeed
    calling what torch 2.13 has, and bitsandbytes missing a package of kernels that only a model hub can give.
    """
    for renamed in (
        "`is_gradient_checkpointing` is deprecated",
        "`torch.distributed.all_gather_into_tensor`",
        "`torch.distributed.reduce_scatter_tensor`",
    ):
        warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
