"""The prefix forest holds every sequence and each shared prefix once; its mask is each sequence's own past."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.preferences.forest import LONGEST_TREE, group, grow, grow_tree, pack, pays

token = st.integers(1, 3)
sequence = st.lists(token, min_size=1, max_size=8)
beginning = st.lists(token, max_size=6)
family = st.tuples(beginning, st.lists(sequence, min_size=1, max_size=5)).map(lambda f: [f[0] + end for end in f[1]])
sequences = st.lists(family, min_size=1, max_size=4).map(lambda families: [s for f in families for s in f])


def seen(forest, row, query):
    """Return the columns that `query` attends to under the mask, in order."""
    return [k for k in range(query + 1) if query < forest.subtree_end[row, k]]


@given(sequences)
def test_every_leaf_sees_its_own_sequence_and_nothing_else(given_sequences):
    forest = grow(given_sequences, pad_token_id=0)
    for sequence, (row, column) in zip(given_sequences, forest.leaves, strict=True):
        path = seen(forest, row, column)
        assert forest.input_ids[row, path].tolist() == sequence
        assert forest.position_ids[row, path].tolist() == list(range(len(sequence)))


@given(sequences)
def test_every_token_sees_the_beginning_that_leads_to_it(given_sequences):
    """This must hold for inner tokens too, since later tokens attend to their hidden states."""
    forest = grow(given_sequences, pad_token_id=0)
    beginnings = {tuple(s[: i + 1]) for s in given_sequences for i in range(len(s))}
    for row, query in zip(*np.nonzero(forest.input_ids), strict=True):
        path = seen(forest, row, query)
        assert path[-1] == query
        assert tuple(forest.input_ids[row, path].tolist()) in beginnings


@given(sequences)
def test_a_tree_holds_each_beginning_once(given_sequences):
    tree = grow_tree(given_sequences)
    assert len(tree.ids) == len({tuple(s[: i + 1]) for s in given_sequences for i in range(len(s))})


@given(sequences, st.integers(1, 16))
def test_padding_sees_itself_alone_and_rows_fill_up(given_sequences, multiple):
    forest = grow(given_sequences, pad_token_id=0, multiple_of=multiple)
    rows, length = forest.input_ids.shape
    assert length % multiple == 0
    assert (forest.input_ids != 0).sum() <= sum(map(len, given_sequences))
    for row, column in zip(*np.nonzero(forest.input_ids == 0), strict=True):
        assert forest.subtree_end[row, column] == column + 1
        assert seen(forest, row, column) == [column]
    assert rows == 1 or (forest.input_ids != 0).any(axis=1).all()


@given(sequences)
def test_groups_hold_every_sequence_once_and_stay_bounded(given_sequences):
    groups = group(given_sequences)
    assert sorted(k for members in groups for k in members) == list(range(len(given_sequences)))
    longest = max(map(len, given_sequences))
    for members in groups:
        assert len(grow_tree([given_sequences[k] for k in members]).ids) <= LONGEST_TREE * longest


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_packing_overlaps_nothing_and_leaves_no_two_rows_half_empty(lengths):
    places, rows = pack(lengths)
    filled = [[] for _ in range(rows)]
    for (row, start), length in zip(places, lengths, strict=True):
        filled[row] += range(start, start + length)
    assert all(sorted(row) == list(range(len(row))) and 0 < len(row) <= max(lengths) for row in filled)
    assert sum(len(row) * 2 <= max(lengths) for row in filled) <= 1


def test_a_pair_shares_its_prompt_and_strangers_share_nothing():
    prompt = list(range(1, 101))
    forest = grow([[*prompt, 200, 201], [*prompt, 300], [*prompt, 200, 201], [500, 501]], pad_token_id=0)
    assert (forest.input_ids != 0).sum() == 100 + 2 + 1 + 2
    assert forest.leaves[0].tolist() == forest.leaves[2].tolist(), "identical responses are computed once"


def test_a_shared_begin_token_alone_makes_no_tree():
    assert len(group([[1, *[5] * 40], [1, *[6] * 40]])) == 2


def test_a_forest_pays_where_it_is_less_work():
    prompt = list(range(1000))
    pairs = [[*prompt, 5000 + i, *range(10 * i)] for i in range(4)]
    assert pays(grow(pairs, pad_token_id=0), pairs, width=768)
    strangers = [[10_000 * i + j for j in range(300)] for i in range(4)]
    assert not pays(grow(strangers, pad_token_id=0), strangers, width=256), (
        "one length, nothing shared: no mask is less work"
    )
    assert pays(grow([*strangers, [1]], pad_token_id=0), [*strangers, [1]], width=256), "padding is work too"
