"""Comparisons of one prompt that stand in several rows, gathered into one comparison of all their responses."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_rm.preferences.prefixes import shared_length
from qlora_rm.preferences.split import Digest
from qlora_rm.preferences.table import dataset_of

if TYPE_CHECKING:
    from datasets import Dataset


def gather(dataset: "Dataset", prompts: Sequence[Digest]) -> "Dataset":
    """One row per prompt, in order of first appearance.

    Arguments:
        dataset: rows by `table.SCHEMA`.
        prompts: the hash of each row's prompt.
    """
    members: dict[Digest, list[int]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(row)

    def rows() -> Iterator[dict[str, Any]]:
        for group in members.values():
            yield dataset[group[0]] if len(group) == 1 else merged([dataset[row] for row in group])

    return dataset_of(rows())


def merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One comparison of the rows' distinct responses, with all their pairs.

    A comparison's loss is its weight times the mean over its pairs. Weights add up, so a pair keeps the weight it had
    in a row of its own; a pair that stands in several rows, in either order, counts as often as it stands there.
    """
    index: dict[tuple[int, ...], int] = {}
    wins, ties, margins = [], [], []
    for row in rows:
        ids = [tuple(row["prompt_ids"] + response) for response in row["response_ids"]]
        place = [index.setdefault(sequence, len(index)) for sequence in ids]
        wins += [[place[i], place[j]] for i, j in row["wins"]]
        ties += [[place[i], place[j]] for i, j in row["ties"]]
        margins += row["margins"]
    sequences = [list(sequence) for sequence in index]
    shared = shared_length(sequences)
    responses = [sequence[shared:] for sequence in sequences]
    return rows[0] | {
        "prompt_ids": sequences[0][:shared],
        "response_ids": responses,
        "wins": wins,
        "ties": ties,
        "margins": margins,
        "weight": sum(row["weight"] for row in rows),
        "length": max(map(len, sequences)),
        "tokens": shared + sum(map(len, responses)),
    }
