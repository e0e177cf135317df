"""Result files: an unwritable path fails before any work, and a file appears only when it is complete."""

import codecs
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from qlora_rm.console import COMMANDS
from qlora_rm.errors import UserError

STANDARD = "-"


@contextmanager
def writing(path: str | None) -> Iterator[TextIO]:
    """Open a text file that appears as `path` if the block succeeds, and not at all otherwise.

    `-` is standard output; None is a buffer that is discarded.

    Raises:
        UserError: the file cannot be written; raised before the block runs.
    """
    if path is None or path == STANDARD:
        if path and isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # like a file, and as JSON requires
        yield StringIO() if path is None else sys.stdout
        return
    target = Path(path).absolute()
    if target.is_dir():
        raise UserError(f"{path} is a folder; name a file in it.")
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        file = beside.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        with file:
            yield file
        beside.replace(target)
    except BaseException:
        beside.unlink()
        raise


def as_json(value: Any) -> str:
    """Return an indented JSON document. It is ASCII where standard output is not UTF-8, which JSON requires."""
    is_utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"
    return _printable(json.dumps(value, ensure_ascii=not is_utf8, indent=1)) + "\n"


def json_line(value: Any) -> str:
    """Return one line of JSON with non-ASCII text kept; lone surrogates, which UTF-8 cannot encode, are escaped."""
    return f"{_printable(json.dumps(value, ensure_ascii=False))}\n"


def _printable(text: str) -> str:
    """Escape characters in JSON text that control a terminal, and lone surrogates."""
    return COMMANDS.sub(lambda found: found[0] if found[0] == "\n" else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]  # DEL is ASCII, which json leaves alone
