"""Merging of comparisons that have the same prompt into one comparison of all their responses."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_rm.preferences.arrow_table import dataset_of
from qlora_rm.preferences.prefixes import shared_length
from qlora_rm.preferences.split import Digest

if TYPE_CHECKING:
    from datasets import Dataset


def gather(dataset: "Dataset", prompts: Sequence[Digest]) -> "Dataset":
    """Merge rows with the same prompt, in order of first appearance.

    Only rows whose pairs have equal weights are merged, so that every pair keeps its weight. Rows with ties are not
    merged, since the objective decides the weight of a tie.

    Arguments:
        dataset: rows in `arrow_table.SCHEMA`.
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
    """Return one comparison of the rows' distinct responses, with all their pairs.

    A comparison's loss is its weight times the mean over its pairs. The rows' weights are summed, so pairs of equal
    weight keep it. A pair that occurs in several rows, in either order, counts once per occurrence.
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
