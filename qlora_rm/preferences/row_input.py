"""Streaming of rows from one file or from standard input."""

import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qlora_rm.errors import UserError
from qlora_rm.preferences.file_formats import MAX_ROW_BYTES, open_rows
from qlora_rm.preferences.row_bytes import BombError, RowStream

STANDARD = "-"
"""Name of standard input."""


@contextmanager
def reading(path: str, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[RowStream]:
    """Open an existing file of lines; a .gz file is decompressed, and `-` is standard input.

    Raises:
        UserError: the file cannot be opened, or cannot be decompressed to its end.
    """
    if path == STANDARD:
        yield RowStream(sys.stdin.buffer, max_row_bytes)
        return
    with ExitStack() as stack:
        try:
            rows = stack.enter_context(open_rows(Path(path), max_row_bytes))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            yield rows
        except (EOFError, zlib.error, gzip.BadGzipFile, BombError) as error:
            raise UserError(f"{path} cannot be read to its end: {error}. The file may be damaged.") from error
