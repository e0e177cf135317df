"""Comparisons of one prompt that stand in several rows, gathered into one comparison of all their responses."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_rm.preferences.arrow_table import dataset_of
from qlora_rm.preferences.prefixes import shared_length
from qlora_rm.preferences.split import Digest

if TYPE_CHECKING:
    from datasets import Dataset


def gather(dataset: "Dataset", prompts: Sequence[Digest]) -> "Dataset":
    """One row per prompt, in order of first appearance.

    Only rows whose pairs weigh the same are gathered, so that every pair keeps its weight; rows with ties stay as they
    are, since how much a tie weighs is the objective's choice.

    Arguments:
        dataset: rows by `table.SCHEMA`.
        prompts: the hash of each row's prompt.
    """
    members: dict[Any, list[int]] = {}
    for row, (prompt, wins, ties, weight) in enumerate(
        zip(prompts, dataset["wins"], dataset["ties"], dataset["weight"], strict=True)
    ):
        alike = row if ties or not wins else round(weight / len(wins), 9)
        members.setdefault((prompt, bool(ties or not wins), alike), []).append(row)

    def rows() -> Iterator[dict[str, Any]]:
        for group in members.values():
            yield dataset[group[0]] if len(group) == 1 else merged([dataset[row] for row in group])

    return dataset_of(rows())


def merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One comparison of the rows' distinct responses, with all their pairs.

    A comparison's loss is its weight times the mean over its pairs. Weights add up, so where all pairs weigh the same
    each keeps its weight; a pair that stands in several rows, in either order, counts as often as it stands there.
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
