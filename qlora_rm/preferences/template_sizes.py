"""Size limits for the operations of a chat template, checked before the result is computed."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jinja2 import TemplateError
from jinja2.utils import Namespace

NUMBER = 1_000_000
"""Largest number that an operation accepts as a width or a count."""

ENTRY = 256
"""Size of a list entry in characters, chosen by the time that it takes to visit one."""

PLAIN = (int, float, bool, type(None))

_LONG_NUMBER = re.compile(r"\d{7,}")


class TooLarge(TemplateError):
    """An operation whose result would exceed the limit of a rendering."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the template makes something of size {size:,}, more than a conversation needs")


def weight(value: Any, limit: int) -> int:
    """Return the size of `value`: its characters plus `ENTRY` per entry at any depth; repeated entries count again.

    Raises:
        TooLarge: the size is above `limit`.
    """
    total, waiting = 0, [value]
    while waiting:
        found = waiting.pop()
        kind = type(found)
        total += ENTRY
        if kind is str or kind is bytes:
            total += len(found)
        elif kind in PLAIN:
            continue
        elif kind is list or kind is tuple:
            waiting += found
        elif isinstance(found, Namespace):
            waiting.append(found._Namespace__attrs)  # jinja's private attribute
        elif isinstance(found, Mapping):
            waiting += [*found.keys(), *found.values()]
        elif isinstance(found, (range, str, bytes)):
            total += len(found)
        elif isinstance(found, Collection):
            waiting += found
        if total + ENTRY * len(waiting) > limit:
            raise TooLarge(total + ENTRY * len(waiting))
    return total


def formatted(text: str | bytes, values: Any, limit: int, mark: str = "%") -> None:
    """Reject a format whose widths or values make a text of more than `limit` characters.

    Arguments:
        text: a format in printf style or for str.format.
        mark: the character that begins a field of `text`.
    """
    plain = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    if wide := _LONG_NUMBER.search(plain):
        raise TooLarge(int(wide[0][:15]))
    fields = 1 + plain.count(mark)
    if "*" in plain and mark == "%":
        numbers = [one for one in (values if isinstance(values, tuple) else (values,)) if isinstance(one, int)]
        _require(max(map(abs, numbers), default=0), NUMBER)
    _require(fields * weight(values, limit), limit)


def _require(size: int, limit: int) -> None:
    if size > limit:
        raise TooLarge(size)


def _replace(limit: int, text: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    text, old, new = _text(text), _text(old), _text(new)
    most = len(text) + 1 if not old else len(text) // len(old)
    if most * len(new) + len(text) > limit:
        _require(text.count(old) * len(new) + len(text), limit)


def _join(limit: int, separator: Any, parts: Any = ()) -> None:
    if isinstance(parts, Collection):
        _require(weight(parts, limit) + len(parts) * len(separator), limit)


def _join_filter(limit: int, value: Any, d: Any = "", attribute: Any = None) -> None:
    if isinstance(value, Collection):
        _require((0 if attribute else weight(value, limit)) + len(value) * len(_text(d)), limit)


def _expandtabs(limit: int, text: Any, tabsize: Any = 8) -> None:
    _require(len(text) + text.count(b"\t" if isinstance(text, bytes) else "\t") * _number(tabsize), limit)


def _translate(limit: int, text: Any, table: Any = None, *_: Any) -> None:
    longest = (
        max(map(len, filter(lambda v: isinstance(v, str), table.values())), default=1)
        if isinstance(table, Mapping)
        else 1
    )
    _require(len(text) * max(1, longest), limit)


def _indent(limit: int, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    plain = _text(text)
    step = len(width) if isinstance(width, str) else _number(width)
    _require(len(plain) + (1 + len(plain.splitlines())) * step, limit)


def _wordwrap(
    limit: int, text: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None, *_: Any
) -> None:
    _require(len(_text(text)) * max(1, len(wrapstring or "")), limit)


def _tojson(
    limit: int, value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, *_: Any, **__: Any
) -> None:
    step = len(indent) if isinstance(indent, str) else _number(indent)
    longest = max(map(len, separators), default=1) if isinstance(separators, (list, tuple)) else 1
    _require(weight(value, limit) * (6 if ensure_ascii else 1) * max(1, longest) * (1 + step), limit)


def _format(limit: int, text: Any, *args: Any, **kwargs: Any) -> None:
    formatted(_text(text), args or kwargs, limit)


def _sum(limit: int, values: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):  # summing lists copies them at each step
        raise TemplateError("the filter sum adds numbers only")


def _round(limit: int, value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    _require(_number(precision), 1000)


def _whole(limit: int, value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, Collection):
        weight(value, limit)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value) if isinstance(value, (int, float)) or value is None else ""


def _number(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


METHODS: dict[str, Callable[..., None]] = {
    "replace": _replace,
    "join": _join,
    "expandtabs": _expandtabs,
    "translate": _translate,
}
"""String methods whose result may be longer than the sum of their arguments' lengths and numbers."""

FILTERS: dict[str, Callable[..., None]] = {
    "replace": _replace,
    "join": _join_filter,
    "indent": _indent,
    "wordwrap": _wordwrap,
    "tojson": _tojson,
    "format": _format,
    "sum": _sum,
    "round": _round,
    "string": _whole,
    "pprint": _whole,
    "urlize": _whole,
    "xmlattr": _whole,
}
"""Filters whose result may be longer in the same way, or that need another check."""
