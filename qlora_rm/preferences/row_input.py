"""The rows of one file or of standard input, read one after the other and never held together."""

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
    """An existing file of lines, expanded where it ends in .gz; `-` is stdin.

    Raises:
        UserError: it cannot be opened, or cannot be expanded to its end.
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
