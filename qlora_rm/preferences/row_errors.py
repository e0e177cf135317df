"""Faults of single rows, and the ledger that either stops at a fault or counts it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_rm.errors import UserError
from qlora_rm.preferences.comparison import Origin

SKIP_HINT = "Mend the row, or pass --on_bad_row skip to leave such rows out and count them."
MAX_NAMED_SOURCES = 20


class RowFault(Exception):
    """The reason why one row cannot become a comparison.

    Attributes:
        kind: short snake_case name, the same for all rows with this fault; the ledger counts by it.
        what: what is wrong, without the file and row, which the caller adds.
        way_out: what the user can do about it.
    """

    def __init__(self, kind: str, what: str, way_out: str = SKIP_HINT) -> None:
        super().__init__(what)
        self.kind, self.what, self.way_out = kind, what, way_out

    def at(self, where: object) -> UserError:
        """Return the error that names the row by `where`, such as its file and number."""
        return UserError(f"{where}: {self.what}. {self.way_out}".rstrip())


@dataclass
class Skipped:
    """The number of rows dropped for one kind of fault, and the first of them."""

    count: int
    first: str


@dataclass
class Ledger:
    """Counts of one load; every dropped row is counted here.

    Arguments:
        on_bad_row: "error" turns a fault into a `UserError`; "skip" counts it by kind.
        over_long: the over-long rule, which overrides `on_bad_row`: "drop" counts an over-long row, "error" stops.
    """

    on_bad_row: Literal["error", "skip"] = "error"
    over_long: str = "truncate_prompt"
    rows: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    unread_columns: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, Skipped] = field(default_factory=dict)

    def fault(self, origin: Origin, fault: RowFault) -> None:
        """Count `fault`, or raise it as a `UserError` naming file and row, depending on its kind."""
        if self._stops_at(fault.kind):
            raise fault.at(origin)
        seen = self.skipped.setdefault(fault.kind, Skipped(0, f"{origin}: {fault.what}"))
        seen.count += 1

    def _stops_at(self, kind: str) -> bool:
        if kind == "over_long":
            return self.over_long != "drop"
        return self.on_bad_row == "error"

    def format_of(self, file: str, name: str, unread: list[str]) -> None:
        """Record the recognized format of `file`, and its columns that are not read."""
        self.formats[file] = name
        if unread:
            self.unread_columns[file] = unread

    def lines(self) -> list[str]:
        """Return the report as text: one line per file and source, one per kind of fault."""
        lines = [f"{file}: {name}" for file, name in shortened(self.formats)]
        lines += [f"{file}: columns not read: {', '.join(names)}" for file, names in shortened(self.unread_columns)]
        lines += [
            f"{source}: {count} rows read, {self.kept[source]} comparisons kept"
            for source, count in shortened(dict(self.rows))
        ]
        for kind, seen in self.skipped.items():
            verb = "dropped" if kind == "over_long" else "skipped"
            lines.append(f"{verb} {seen.count} x {kind}, first: {seen.first}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "rows": dict(self.rows),
            "kept": dict(self.kept),
            "formats": dict(self.formats),
            "unread_columns": dict(self.unread_columns),
            "skipped": {kind: {"count": seen.count, "first": seen.first} for kind, seen in self.skipped.items()},
        }


def shortened(items: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the first `MAX_NAMED_SOURCES` items and one line for the rest: a folder may hold thousands of shards."""
    named = list(items.items())[:MAX_NAMED_SOURCES]
    rest = len(items) - len(named)
    return named + ([(f"... and {rest} more", "(see the JSON report)")] if rest else [])
