"""The common prefix of sequences."""

from collections.abc import Sequence
from typing import Any


def shared_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Return how many leading items all of `sequences` (texts, or lists of token ids) have in common.

    The lexicographically first and last sequence share exactly the prefix that all share. Bisection finds its length
    with one comparison in C per step.
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
