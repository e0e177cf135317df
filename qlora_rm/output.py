"""Files of results: refused at once where they cannot be written, and never seen half written."""

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
    """A text file that appears as `path` once the block has ended well, and not at all otherwise.

    `-` is standard output, None a file that nobody sees.

    Raises:
        UserError: it cannot be written, before anything else is done.
    """
    if path is None or path == STANDARD:
        if path and isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as a file would be, and as JSON must be
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
    """A JSON document for people and programs; in ASCII where standard output is not UTF-8, which JSON must be."""
    is_utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"
    return _printable(json.dumps(value, ensure_ascii=not is_utf8, indent=1)) + "\n"


def json_line(value: Any) -> str:
    """One line of JSON, readable in any script; half characters, which UTF-8 cannot hold, are escaped."""
    return f"{_printable(json.dumps(value, ensure_ascii=False))}\n"


def _printable(text: str) -> str:
    """JSON whose strings hold no character that a terminal obeys, nor half characters: they are escaped."""
    return COMMANDS.sub(lambda found: found[0] if found[0] == "\n" else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]  # DEL is ASCII, which json leaves alone
