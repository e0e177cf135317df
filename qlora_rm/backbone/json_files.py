"""JSON files that may be damaged or hostile: read completely, or refused with a message."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from qlora_rm.errors import UserError
from qlora_rm.preferences.row_json import depth_of, repeated_key

LARGEST = 1 << 29
"""Size of the largest JSON file that is read, in bytes."""

DEEPEST = 64
"""Largest nesting depth of objects and lists."""

LARGEST_WHOLE = 1 << 63
"""Bound on integers: their absolute values must be smaller."""


def read_json(path: Path, remedy: str, *, strict: bool = True) -> Any:
    """Return the content of a JSON file; refuse NaN, infinite numbers, repeated keys and deep nesting.

    Arguments:
        remedy: the sentence that ends each error message.
        strict: False for a model's configuration, which others write: those of Mamba 2 and its relatives hold Infinity.
            Then only its size, its depth and its integers are bounded.

    Raises:
        UserError: the file cannot be read, or is not such JSON.
        FileNotFoundError: there is no file.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has more than {LARGEST >> 20} MiB, which no such file needs. {remedy}")
        return parse_json(path.read_text(encoding="utf-8"), str(path), remedy, strict=strict)
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {reason}. {remedy}") from None


def parse_json(text: str, where: str, remedy: str, *, strict: bool = True) -> Any:
    """Return the content of JSON text, under the same rules as `read_json`.

    Arguments:
        where: the source that error messages name.

    Raises:
        UserError: the text is not such JSON.
    """

    def refuse(what: str) -> NoReturn:
        raise UserError(f"{where} cannot be read: {what}. {remedy}")

    hooks: dict[str, Any] = {"parse_int": lambda digits: _whole(digits, refuse)}
    if strict:
        hooks |= {
            "parse_constant": lambda word: refuse(f"it holds {word}, which is no JSON number"),
            "parse_float": lambda digits: _finite(digits, refuse),
            "object_pairs_hook": lambda pairs: _once(pairs, refuse),
        }
    try:
        found = json.loads(text, **hooks)
    except RecursionError:
        refuse("it is nested too deeply")
    except ValueError as error:
        refuse(str(error))
    if depth_of(found) > DEEPEST:
        refuse(f"it is nested more than {DEEPEST} levels deep")
    return found


def _finite(digits: str, refuse: Callable[[str], NoReturn]) -> float:
    number = float(digits)
    return number if math.isfinite(number) else refuse(f"it holds the number {digits:.20}, which is too large")


def _whole(digits: str, refuse: Callable[[str], NoReturn]) -> int:
    number = int(digits) if len(digits) <= 20 else LARGEST_WHOLE
    return number if abs(number) < LARGEST_WHOLE else refuse(f"it holds the number {digits:.20}, which is too large")


def _once(pairs: list[tuple[str, Any]], refuse: Callable[[str], NoReturn]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = repeated_key(pairs)
        refuse(f"it holds the key {key!r:.60} twice in one object")
    return found
