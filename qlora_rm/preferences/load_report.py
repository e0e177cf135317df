"""The report of a load: rows read, rows dropped and why, and the contents of each part."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from qlora_rm.preferences.arrow_table import Facts
from qlora_rm.preferences.row_errors import Ledger, shortened


@dataclass(frozen=True)
class Part:
    """Statistics of one part of the data; a comparison that occurs twice counts twice.

    Attributes:
        prompts: distinct prompts.
        wins, ties: pairs of responses.
        truncated, tokens_cut: comparisons whose prompt lost its oldest tokens, and the number of those tokens, counted
            once per comparison, not once per response.
        longest, median_length: of the comparisons' longest sequences, in tokens.
        sources: comparisons per source.
    """

    comparisons: int
    prompts: int
    wins: int
    ties: int
    truncated: int
    tokens_cut: int
    longest: int
    median_length: float
    sources: dict[str, int]

    @classmethod
    def of(cls, facts: Sequence[Facts], indices: Sequence[int]) -> "Part":
        rows = [facts[index] for index in indices]
        return cls(
            comparisons=len(rows),
            prompts=len({row.prompt for row in rows}),
            wins=sum(row.wins for row in rows),
            ties=sum(row.ties for row in rows),
            truncated=sum(row.cut > 0 for row in rows),
            tokens_cut=sum(row.cut for row in rows),
            longest=max(row.length for row in rows),
            median_length=median(row.length for row in rows),
            sources=dict(Counter(row.source for row in rows)),
        )

    def lines(self, name: str) -> list[str]:
        lines = [
            f"{name}: {self.comparisons:,} comparisons of {self.prompts:,} prompts, {self.wins:,} wins and "
            f"{self.ties:,} ties; longest {self.longest:,} tokens, median {self.median_length:,.0f}"
        ]
        if self.truncated:
            lines.append(f"{name}: {self.truncated:,} prompts truncated, {self.tokens_cut:,} tokens cut")
        if len(self.sources) > 1:
            lines.append(f"{name} by source: " + ", ".join(f"{key} {count}" for key, count in shortened(self.sources)))
        return lines


@dataclass(frozen=True)
class Report:
    """The complete report of a load.

    Attributes:
        ledgers: by data read: "data", or "training data" and "held-out data" if these are read separately.
        parts: "training" and "held-out", or "comparisons" if the data is not split.
        notes: warnings and mixing, one sentence each.
    """

    ledgers: dict[str, Ledger]
    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report as text, one line per fact."""
        read: Iterable[str] = (f"{name}: {line}" for name, ledger in self.ledgers.items() for line in ledger.lines())
        return [*read, *(line for name, part in self.parts.items() for line in part.lines(name)), *self.notes]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "read": {name: ledger.as_dict() for name, ledger in self.ledgers.items()},
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "notes": self.notes,
        }
