"""Output streams that survive a closed pipe or full disk: the run continues and logs the rest to a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

NOTE = "the output could not be written any more ({}); the log goes on here\n"


class Readers:
    """Where the output goes once the stream cannot be written.

    Attributes:
        log: the file; None discards the output.
    """

    def __init__(self) -> None:
        self.log: Path | None = None


class Outliving:
    """A text stream that is redirected to `readers.log` at the first failed write (closed pipe, full disk).

    Text still in the buffer goes to the file too, and so does what libraries write to the same descriptor.
    """

    def __init__(self, stream: TextIO, readers: Readers):
        self._stream, self._readers = stream, readers

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._redirect(error)
            # a buffered stream holds the text in its buffer, which _redirect has flushed
            return self._stream.write(text) if getattr(self._stream, "write_through", False) else len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._redirect(error)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def _redirect(self, error: OSError) -> None:
        for file in (self._readers.log, Path(os.devnull)):
            if file is None:
                continue
            try:
                handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                os.write(handle, NOTE.format(error.strerror).encode())
                os.dup2(handle, self._stream.fileno())
                os.close(handle)
                self._stream.flush()
                return
            except OSError:
                continue


@contextmanager
def outliving_readers() -> Iterator[Readers]:
    """Make standard output and error survive failed writes inside the block."""
    readers, before = Readers(), (sys.stdout, sys.stderr)
    outliving = [Outliving(stream, readers) for stream in before]
    sys.stdout, sys.stderr = outliving
    try:
        yield readers
    finally:
        for stream in outliving:
            stream.flush()
        if (sys.stdout, sys.stderr) == tuple(outliving):
            sys.stdout, sys.stderr = before
