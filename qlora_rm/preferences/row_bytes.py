"""Splitting of a byte stream into rows; a row longer than `--max_row_bytes` is skipped without holding it in memory.

Each function yields the text of a row, or None for a row that is too long.
"""

import re
from collections.abc import Iterator
from typing import IO

from qlora_rm.preferences.row_errors import RowFault

CHUNK = 2**18
SKIPPED_AT_MOST = 16
"""Largest over-long row that is skipped in a compressed file, in multiples of the limit; a longer one is an error."""


class RowTooLong(Exception):
    """A row of a CSV file is longer than the limit; its rest has been skipped."""


class BombError(ValueError):
    """A row of a compressed file expands without apparent end."""


def too_long(limit: int) -> RowFault:
    """Return the fault of a row of more than `limit` bytes."""
    return RowFault(
        "row_too_long",
        f"the row has more than {limit:,} bytes, the limit that --max_row_bytes sets",
        "Raise --max_row_bytes, or pass --on_bad_row skip to leave such rows out and count them.",
    )


class RowStream:
    """A stream of bytes that is read row by row.

    Arguments:
        stream: open for reading.
        limit: largest size of a row in bytes.
        compressed: whether `stream` decompresses a file; skipping a long row is then limited too.
    """

    def __init__(self, stream: IO[bytes], limit: int, compressed: bool = False) -> None:
        self.stream, self.limit = stream, limit
        self._most = SKIPPED_AT_MOST * limit if compressed else None

    def lines(self) -> Iterator[bytes | None]:
        """Yield each line with its line break.

        Raises:
            BombError: a line of a compressed file expands too far.
        """
        read, most = self.stream.readline, self.limit + 1
        while line := read(most):
            if len(line) == most and not line.endswith(b"\n"):
                self._skip_line()
                yield None
            else:
                yield line

    def _skip_line(self) -> None:
        skipped = self.limit
        while (piece := self.stream.readline(CHUNK)) and not piece.endswith(b"\n"):
            skipped += len(piece)
            self.check(skipped)

    def check(self, length: int) -> None:
        """Raise a `BombError` if a row of `length` bytes so far must not be skipped any further."""
        if self._most is not None and length > self._most:
            raise BombError(
                f"a row of it expands to more than {self._most:,} bytes, {SKIPPED_AT_MOST} times --max_row_bytes"
            )

    def elements(self) -> Iterator[bytes | None]:
        """Yield the text of each element of the stream's JSON array, valid or not.

        Raises:
            ValueError: the array does not end, or something follows it.
            BombError: an element of a compressed file expands too far.
        """
        yield from _Array(self).elements()


class CsvLines:
    """The lines of a CSV file for `csv.reader`, which takes as many as a row has.

    Call `begin_row` before each row. Bytes that are not UTF-8 become surrogates, which are a fault of their row.
    """

    def __init__(self, rows: RowStream) -> None:
        self._rows, self._first = rows, True
        self.begin_row()

    def begin_row(self) -> None:
        self._length = self._quotes = 0

    def __iter__(self) -> "CsvLines":
        return self

    def __next__(self) -> str:
        """Return the next line; raise `RowTooLong` after skipping the complete row."""
        line = self._rows.stream.readline(self._rows.limit + 1 - self._length)
        if not line:
            raise StopIteration
        if self._first:
            line, self._first = line.removeprefix(b"\xef\xbb\xbf"), False
        self._count(line)
        if self._length <= self._rows.limit:
            return line.decode(errors="surrogateescape")
        while self._quotes % 2 or not line.endswith(b"\n"):
            if not (line := self._rows.stream.readline(CHUNK)):
                break
            self._count(line)
            self._rows.check(self._length)
        raise RowTooLong

    def _count(self, line: bytes) -> None:
        self._length += len(line)
        self._quotes += line.count(b'"')


_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[\]{},]', re.DOTALL)
"""A string, without its closing quotation mark if the chunk ends inside it; or a structural character."""
_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("?)', re.DOTALL)
"""The rest of a string that began in an earlier chunk."""
_OPEN, _CLOSE, _END, _QUOTE = b"[{", b"]}", b"]"[0], b'"'[0]


class _Array:
    """A splitter of one JSON array into its elements, chunk by chunk."""

    def __init__(self, rows: RowStream) -> None:
        self.rows = rows
        self.depth = 0
        self.ended = self.in_string = self.escaped = False
        self.pieces: list[bytes] = []
        self.length = 0

    def elements(self) -> Iterator[bytes | None]:
        count = 0
        while chunk := self.rows.stream.read(CHUNK):
            for element in self._of_chunk(chunk):
                if self.ended and not count and element is not None and not element.strip():
                    continue  # an empty array
                count += 1
                yield element
        if not self.ended:
            raise ValueError("the file ends inside the array")

    def _of_chunk(self, chunk: bytes) -> Iterator[bytes | None]:
        begin, position = 0, self._after_string(chunk)
        for mark in _MARK.finditer(chunk, position):
            at = mark.start()
            character = chunk[at]
            if self.ended:
                break
            if character == _QUOTE:
                if not mark[1]:
                    self._leave_open(chunk, at + 1)
            elif character in _OPEN:
                self.depth += 1
                if self.depth == 1:
                    begin = at + 1
            elif character in _CLOSE:
                self.depth -= 1
                if self.depth == 0:
                    if character != _END:
                        raise ValueError("the array ends with }")
                    self.ended = True
                    yield self._take(chunk[begin:at])
                    begin = at + 1
            elif self.depth == 1:
                yield self._take(chunk[begin:at])
                begin = at + 1
        if not self.ended:
            self._add(chunk[begin:])
        elif chunk[begin:].strip():
            raise ValueError("something follows the array")

    def _after_string(self, chunk: bytes) -> int:
        """Return where structure continues in `chunk`: after the string that an earlier chunk left open."""
        if not self.in_string:
            return 0
        rest = _REST.match(chunk, int(self.escaped))
        assert rest is not None
        self.in_string = False
        if not rest[1]:
            self._leave_open(chunk, int(self.escaped))
            return len(chunk)
        self.escaped = False
        return rest.end()

    def _leave_open(self, chunk: bytes, start: int) -> None:
        """Record that the chunk ends inside a string, from `start` on, and if a backslash escapes the next byte."""
        part = chunk[start:]
        self.in_string, self.escaped = True, (len(part) - len(part.rstrip(b"\\"))) % 2 == 1

    def _add(self, piece: bytes) -> None:
        self.length += len(piece)
        if self.length > self.rows.limit:
            self.pieces.clear()
            self.rows.check(self.length)
        else:
            self.pieces.append(piece)

    def _take(self, piece: bytes) -> bytes | None:
        self._add(piece)
        element = None if self.length > self.rows.limit else b"".join(self.pieces)
        self.pieces, self.length = [], 0
        return element
