"""Comparisons as Arrow columns: token ids are int32, and at most a thousand rows are Python lists at a time."""

import heapq
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qlora_rm.preferences.comparison import Candidates, Comparison
from qlora_rm.preferences.split import Digest, digest, prompt_key
from qlora_rm.preferences.text_as import Kind, kind_of_row
from qlora_rm.preferences.tokenization import Tokenized

if TYPE_CHECKING:
    from datasets import Dataset

IDS, PAIRS = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))
SCHEMA = pa.schema(
    {
        "prompt_ids": IDS,
        "response_ids": PAIRS,
        "wins": PAIRS,
        "ties": PAIRS,
        "margins": pa.list_(pa.float32()),
        "weight": pa.float32(),
        "source": pa.string(),
        "length": pa.int32(),
        "tokens": pa.int32(),
        "origin": pa.string(),
    }
)
"""One row per comparison: `Tokens`, `Preferences`, `length` of the longest sequence, number of `tokens` with the shared
prefix counted once, and `origin` as `file, row N`."""

BATCH = 1000
SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Facts:
    """What splitting, mixing and reporting need of a comparison, without its tokens.

    Attributes:
        entry: index of its data set.
        kind: text, turns or token ids.
        prompt: hash of its prompt.
        content: hash of its tokens and preferences.
    """

    entry: int
    kind: Kind
    source: str
    prompt: Digest
    content: Digest
    length: int
    cut: int
    wins: int
    ties: int


@dataclass
class Table:
    """A table that grows by one comparison at a time; `facts[i]` describes row i.

    The table keeps the untokenized candidates with the `SAMPLE` lowest prompt hashes. `split.hold_out` takes the lowest
    hashes too, so the sample always contains held-out rows.
    """

    facts: list[Facts] = field(default_factory=list)
    _batches: list[pa.RecordBatch] = field(default_factory=list)
    _pending: list[dict[str, Any]] = field(default_factory=list)
    _sample: list[tuple[int, int, Candidates]] = field(default_factory=list)

    def append(self, comparison: Comparison, tokenized: Tokenized, entry: int) -> None:
        preferences, tokens = comparison.preferences, tokenized.tokens
        row: dict[str, Any] = {
            "prompt_ids": tokens.prompt_ids,
            "response_ids": tokens.response_ids,
            "wins": preferences.wins,
            "ties": preferences.ties,
            "margins": preferences.margins,
            "weight": preferences.weight,
            "source": preferences.source,
            "length": len(tokens.prompt_ids) + max(map(len, tokens.response_ids)),
            "tokens": len(tokens.prompt_ids) + sum(map(len, tokens.response_ids)),
            "origin": str(comparison.origin),
        }
        key = prompt_key(comparison.candidates)
        self._keep_sample(key, comparison.candidates)
        self.facts.append(
            Facts(
                entry,
                kind_of_row(comparison.candidates),
                preferences.source,
                key,
                _content(row),
                row["length"],
                tokenized.cut,
                len(preferences.wins),
                len(preferences.ties),
            )
        )
        self._pending.append(row)
        if len(self._pending) == BATCH:
            self._flush()

    def _keep_sample(self, key: Digest, candidates: Candidates) -> None:
        """Keep the lowest hashes in a heap whose top is the highest of them; the row index breaks ties."""
        item = (-int.from_bytes(key), -len(self.facts), candidates)
        if len(self._sample) < SAMPLE:
            heapq.heappush(self._sample, item)
        elif item[:2] > self._sample[0][:2]:
            heapq.heapreplace(self._sample, item)

    def sample(self, indices: Sequence[int], count: int) -> list[Candidates]:
        """Return at most `count` kept candidates whose rows are in `indices`, spread evenly over their lengths."""
        among = set(indices)
        kept = [(self.facts[-row].length, -row, candidates) for _, row, candidates in self._sample if -row in among]
        kept.sort(key=lambda item: item[:2])
        if len(kept) <= count:
            return [candidates for *_, candidates in kept]
        return [kept[step * (len(kept) - 1) // (count - 1)][2] for step in range(count)]

    def dataset(self) -> "Dataset":
        """Return everything appended so far, in that order."""
        self._flush()
        return _dataset(self._batches)

    def _flush(self) -> None:
        if self._pending:
            self._batches.append(pa.RecordBatch.from_pylist(self._pending, SCHEMA))
            self._pending.clear()


def dataset_of(rows: Iterable[dict[str, Any]]) -> "Dataset":
    """Return a dataset of rows in `SCHEMA`; at most a thousand of them are Python objects at a time."""
    rows = iter(rows)
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    return _dataset([pa.RecordBatch.from_pylist(batch, SCHEMA) for batch in batches])


def _dataset(batches: Sequence[pa.RecordBatch]) -> "Dataset":
    """Return an in-memory dataset with a random fingerprint.

    The fingerprint only names cache files, and this dataset has none. datasets would pickle the entire table to compute
    it, which takes three times the table's memory.
    """
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    return Dataset(pa.Table.from_batches(batches, SCHEMA), fingerprint=generate_random_fingerprint())


def _content(row: dict[str, Any]) -> Digest:
    """Return a hash of everything a comparison trains on, without its origin."""
    ids = [array("i", sequence).tobytes() for sequence in (row["prompt_ids"], *row["response_ids"])]
    rest = repr([row[name] for name in ("wins", "ties", "margins", "weight", "source")])
    return digest(rest.encode(), *(len(part).to_bytes(8) + part for part in ids))
