"""Batches of a stream, limited in items and bytes, so that little is in memory at once."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def portions(items: Iterable[T], size: Callable[[T], int], most_items: int, most_bytes: int) -> Iterator[list[T]]:
    """Yield lists of consecutive items: at most `most_items`, and at most `most_bytes` unless a single item is larger.

    Arguments:
        size: returns the bytes of an item.
    """
    portion: list[T] = []
    taken = 0
    for item in items:
        more = size(item)
        if portion and (len(portion) == most_items or taken + more > most_bytes):
            yield portion
            portion, taken = [], 0
        portion.append(item)
        taken += more
    if portion:
        yield portion
