"""Size estimates of values."""

from collections.abc import Mapping
from typing import Any


def size_of(value: Any) -> int:
    """Return the approximate size of a value as JSON, in bytes, without serializing it."""
    if isinstance(value, str):
        return _encoded(value)
    size, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            size += _encoded(item)
        elif isinstance(item, bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            rest += item.keys()
            rest += item.values()
        elif isinstance(item, (list, tuple)):
            if item and type(item[0]) in (int, float):
                size += 4 * len(item)
            else:
                rest += item
        else:
            size += 4
    return size


def _encoded(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
