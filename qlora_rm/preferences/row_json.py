"""Parsing of one row's JSON: duplicate keys and deep nesting are faults of the row.

`json.loads` alone keeps the last of two values under one key, and raises errors of its own for deep nesting.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qlora_rm.preferences.row_errors import RowFault

MAX_DEPTH = 100
"""Nesting of arrays and objects. Tool schemas have about ten levels; all later code handles this depth."""

CONTAINERS = (list, tuple, Mapping)

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def parse(text: bytes | str, name: str = "the row") -> Any:
    """Return the value of a JSON text; bytes must be UTF-8.

    Arguments:
        name: name of the text in messages.

    Raises:
        RowFault: broken_json, duplicate_key or nested_too_deeply.
    """
    try:
        if isinstance(text, bytes):
            text = text.removeprefix(BYTE_ORDER_MARK).decode()
        value = _DECODER.decode(text)
    except RecursionError:
        raise _too_deep(name) from None
    except ValueError as error:
        raise RowFault("broken_json", f"{name} is not JSON ({_reason(error)})") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and depth_of(value) > MAX_DEPTH:
        raise _too_deep(name)
    return value


def depth_of(value: Any) -> int:
    """Return the nesting depth of arrays and objects; 0 for a number or text."""
    depth, level = 0, [value] if isinstance(value, CONTAINERS) else []
    while level:
        depth += 1
        inside = (item.values() if isinstance(item, Mapping) else item for item in level)
        level = [part for parts in inside for part in parts if isinstance(part, CONTAINERS)]
    return depth


def repeated_key(pairs: list[tuple[str, Any]]) -> tuple[str, int]:
    """Return the first key that occurs more than once in an object's pairs, and how often."""
    return next((key, count) for key, count in Counter(key for key, _ in pairs).items() if count > 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key, count = repeated_key(pairs)
        raise RowFault("duplicate_key", f"the key {key!r:.60} stands {count} times in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _too_deep(name: str) -> RowFault:
    return RowFault("nested_too_deeply", f"{name} has more than {MAX_DEPTH} arrays and objects inside one another")


def _reason(error: ValueError) -> str:
    """Return the reason in words for users; some of Python's messages are for programmers."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return "an integer has over 4,300 digits" if "integer string conversion" in str(error) else str(error)
