"""The prefix forest: the sequences of a micro-batch, with every shared prefix laid out once.

Shapes: R rows, L tokens a row, S sequences.

A tree is the trie of some sequences in depth-first order. Every token keeps its depth, which is its position in its
sequences, and the index where its subtree ends. Then

    token q attends to token k   <=>   k <= q < subtree_end[k]

This one line states causality (k is not later), sharing (every token below k attends to it) and separation (no other
token does). For "ab c", "ab de" and "f g", where a, b are shared:

    index         0 1 2 3 4 | 5 6        k:  0 1 2 3 4 5 6
    token         a b c d e | f g        a   x
    depth         0 1 2 2 3 | 0 1        b   x x
    subtree_end   5 5 3 5 5 | 7 7        c   x x x
                                         d   x x . x
    scores are read at c, e and g        e   x x . x x
                                         f   . . . . . x
                                         g   . . . . . x x
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_rm.preferences.prefixes import shared_length

Ids = list[int]

SHARE_FROM = 1 / 3
"""Neighbors in sorted order join one tree if they share at least this part of the shorter one. Sharing saves the shared
tokens, but a longer row costs more attention. For two sequences of n tokens that share c, the dense mask's work grows
from 2 n^2 to (2n - c)^2. Divided by 6 times the hidden size, it equals that many tokens of linear work. At c = n / 3
the two costs are equal if n is 2.7 times the hidden size, and sharing wins for shorter n. A threshold of 1/4 lost 4 %
on 512 tokens of width 256."""

LONGEST_TREE = 4
"""Longest tree, in multiples of the longest sequence, since the cost of attention grows with the square of its length.
The next tree repeats the shared prefix."""


@dataclass(frozen=True)
class Tree:
    """The trie of some sequences in depth-first order; `ids`, `depth` and `subtree_end` are parallel.

    Attributes:
        leaves: index of the last token of each sequence, in input order. For a sequence that is a prefix of another it
            is an inner token.
    """

    ids: list[int]
    depth: list[int]
    subtree_end: list[int]
    leaves: list[int]


@dataclass(frozen=True)
class Forest:
    """Trees packed into rows, padded to one length.

    Attributes:
        input_ids, position_ids, subtree_end: int64 [R, L]. A padding token attends to itself only, so that no row of
            the mask is empty.
        leaves: int64 [S, 2], row and column where each sequence's score is read.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    subtree_end: NDArray[np.int64]
    leaves: NDArray[np.int64]


def grow(sequences: Sequence[Ids], pad_token_id: int, multiple_of: int = 1) -> Forest:
    """Pack S non-empty sequences into rows, each shared prefix once; `leaves` is in their order.

    Arguments:
        multiple_of: pad rows to a multiple of this length.
    """
    groups = group(sequences)
    trees = [grow_tree([sequences[k] for k in members]) for members in groups]
    places, rows = pack([len(tree.ids) for tree in trees])
    longest = max(len(tree.ids) for tree in trees)
    length = -(-longest // multiple_of) * multiple_of
    input_ids = np.full((rows, length), pad_token_id, dtype=np.int64)
    position_ids = np.zeros((rows, length), dtype=np.int64)
    subtree_end = np.tile(np.arange(1, length + 1, dtype=np.int64), (rows, 1))
    leaves = np.zeros((len(sequences), 2), dtype=np.int64)
    for members, tree, (row, start) in zip(groups, trees, places, strict=True):
        stretch = slice(start, start + len(tree.ids))
        input_ids[row, stretch] = tree.ids
        position_ids[row, stretch] = tree.depth
        subtree_end[row, stretch] = np.asarray(tree.subtree_end) + start
        leaves[members] = [(row, start + leaf) for leaf in tree.leaves]
    return Forest(input_ids, position_ids, subtree_end, leaves)


def pays(forest: Forest, sequences: Sequence[Ids], width: int) -> bool:
    """Return whether a forest under a dense mask is less work than the padded batch of the same sequences.

    Per layer, a token costs 12 width^2 in linear operations and 2 width in attention for every position of its row: a
    ratio of 6 width to the row's length. Sequences of equal length need no mask, and causal attention then does half
    the work.

    Arguments:
        width: hidden size of the backbone.
    """
    rows, length = forest.input_ids.shape
    longest, shortest = max(map(len, sequences)), min(map(len, sequences))
    plain_row = longest / 2 if longest == shortest else longest
    return rows * length * (6 * width + length) <= len(sequences) * longest * (6 * width + plain_row)


def group(sequences: Sequence[Ids]) -> list[list[int]]:
    """Return the indices of each tree's sequences: runs of neighbors in sorted order that share enough."""
    limit = LONGEST_TREE * max(map(len, sequences))
    groups: list[list[int]] = []
    before: Ids = []
    size = 0
    for k in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[k]
        shared = shared_length((before, sequence))
        joins = shared > 0 and shared >= SHARE_FROM * min(len(before), len(sequence))
        if joins and size + len(sequence) - shared <= limit:
            groups[-1].append(k)
            size += len(sequence) - shared
        else:
            groups.append([k])
            size = len(sequence)
        before = sequence
    return groups


def grow_tree(sequences: Sequence[Ids]) -> Tree:
    """Build the trie of non-empty `sequences`.

    In sorted order, each sequence adds its tokens after the prefix that it shares with the previous one.
    """
    ids: list[int] = []
    depth: list[int] = []
    subtree_end: list[int] = []
    leaves = [0] * len(sequences)
    path: list[int] = []  # index of the token at each depth of the previous sequence
    before: Ids = []
    for k in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[k]
        shared = shared_length((before, sequence))
        _close(path[shared:], subtree_end, len(ids))
        path[shared:] = range(len(ids), len(ids) + len(sequence) - shared)
        ids += sequence[shared:]
        depth += range(shared, len(sequence))
        subtree_end += [0] * (len(sequence) - shared)
        leaves[k] = path[-1]
        before = sequence
    _close(path, subtree_end, len(ids))
    return Tree(ids, depth, subtree_end, leaves)


def _close(path: list[int], subtree_end: list[int], end: int) -> None:
    for index in path:
        subtree_end[index] = end


def pack(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """Pack items first-fit-decreasing into rows as long as the longest; return each item's (row, start), and row count.

    No row is longer than the longest tree, whose attention sets the cost per row anyway.
    """
    capacity = max(lengths)
    places = [(0, 0)] * len(lengths)
    filled: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, used in enumerate(filled) if used + lengths[i] <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = (row, filled[row])
        filled[row] += lengths[i]
    return places, len(filled)
