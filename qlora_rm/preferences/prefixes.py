"""The beginning that sequences share."""

from collections.abc import Sequence
from typing import Any


def shared_length(sequences: Sequence[Sequence[Any]]) -> int:
    """How many leading items all of `sequences` (texts, or lists of token ids) have in common.

    In lexicographic order, what the first and the last share, all share; how much that is, bisection finds, each step
    one comparison in C.
    """
    low, high = min(sequences), max(sequences)  # type: ignore[type-var]
    same, end = 0, min(len(low), len(high))
    while same < end:
        middle = (same + end + 1) // 2
        if low[same:middle] == high[same:middle]:
            same = middle
        else:
            end = middle - 1
    return same
