"""Portions of a stream: few long items or many short ones, so that what is worked on at once stays small."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def portions(items: Iterable[T], size: Callable[[T], int], most_items: int, most_bytes: int) -> Iterator[list[T]]:
    """Lists of consecutive items: at most `most_items`, and of at most `most_bytes` unless one alone has more.

    Arguments:
        size: bytes of an item.
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
