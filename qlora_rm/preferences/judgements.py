"""Parsing of preferences: a pair's order, ranks, scores or pairwise preferences, with margin and weight."""

import math
import sys
from itertools import combinations
from typing import Any, Literal

from qlora_rm.config import MOST_WEIGHT
from qlora_rm.preferences.comparison import Pair, Preferences
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.values import Row, encodable, json_type, short

JUDGEMENTS = ("preferences", "ranks", "scores")
"""Columns with preferences among K responses; the first that is not null is read."""

MOST_RESPONSES = 1024
"""Most responses of one comparison; they make half a million pairs."""

LEAST_WEIGHT = 1e-30
"""Smallest weight of a row: fp32 can represent it and its product with a loss."""


def pair_preferences(row: Row, source: str) -> Preferences:
    """Return the preferences of a pair: response 0 (chosen) beats response 1 (rejected)."""
    margin = row.get("margin")
    margins = () if margin is None else (_margin(margin, "margin"),)
    return Preferences(((0, 1),), (), margins, _weight(row), _source(row, source))


def ranked_preferences(row: Row, count: int, source: str) -> Preferences:
    """Return wins and ties among `count` responses, from the first column of `JUDGEMENTS` that is not null."""
    if count > MOST_RESPONSES:
        raise RowFault("too_many_responses", f"responses holds {count:,}; at most {MOST_RESPONSES:,} are compared")
    column = next((name for name in JUDGEMENTS if row.get(name) is not None), None)
    if column is None:
        raise RowFault("missing_column", f"none of {', '.join(JUDGEMENTS)} is filled")
    if column == "preferences":
        wins, ties = _listed_pairs(row, count)
    else:
        wins, ties = _ordered_pairs(row[column], column, count)
    if not wins and not ties:
        raise RowFault("no_preference", "no response is preferred to another and none are tied")
    margins = _margins(row, len(wins), parallel=column == "preferences")
    return Preferences(tuple(wins), tuple(ties), margins, _weight(row), _source(row, source))


def _ordered_pairs(values: Any, column: str, count: int) -> tuple[list[Pair], list[Pair]]:
    """Return all pairs of `count` responses as wins and ties: a lower rank or a higher score wins, equal values tie."""
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list) else json_type(values)
        raise RowFault("bad_preference", f"{column} holds {found} for {count} responses")
    for index, value in enumerate(values):
        _number(value, f"{column}[{index}]", "bad_preference")
    numbers = values  # compared unconverted, since two large integers may round to one float
    sign = 1 if column == "ranks" else -1
    wins: list[Pair] = []
    ties: list[Pair] = []
    for a, b in combinations(range(count), 2):
        if numbers[a] == numbers[b]:
            ties.append((a, b))
        else:
            wins.append((a, b) if sign * numbers[a] < sign * numbers[b] else (b, a))
    return wins, ties


def _listed_pairs(row: Row, count: int) -> tuple[list[Pair], list[Pair]]:
    """Return `preferences` and `ties` as pairs of indices; no two pairs are of the same responses."""
    pairs = {name: _pairs(row.get(name) or [], name, count) for name in ("preferences", "ties")}
    seen: set[frozenset[int]] = set()
    for a, b in pairs["preferences"] + pairs["ties"]:
        if frozenset((a, b)) in seen:
            raise RowFault("bad_preference", f"responses {a} and {b} are compared more than once")
        seen.add(frozenset((a, b)))
    return pairs["preferences"], pairs["ties"]


def _pairs(values: Any, column: str, count: int) -> list[Pair]:
    if not isinstance(values, list):
        raise RowFault("bad_preference", f"{column} is {json_type(values)}, not an array of pairs of indices")
    for value in values:
        if not (isinstance(value, list) and len(value) == 2 and all(type(index) is int for index in value)):
            raise RowFault("bad_preference", f"{column} holds {short(value)}, which is not a pair of indices")
        if not all(0 <= index < count for index in value) or value[0] == value[1]:
            raise RowFault(
                "bad_preference", f"{column} holds {short(value)}, not two different indices from 0 to {count - 1}"
            )
    return [(a, b) for a, b in values]


def _margins(row: Row, wins: int, parallel: Literal[True, False]) -> tuple[float, ...]:
    values = row.get("margin")
    if values is None:
        return ()
    if not parallel:
        raise RowFault("bad_margin", "margin needs `preferences` to stand beside; ranks and scores have none")
    if not isinstance(values, list) or len(values) != wins:
        raise RowFault("bad_margin", f"margin must be an array of {wins} numbers, one per preference")
    return tuple(_margin(value, f"margin[{index}]") for index, value in enumerate(values))


def _margin(value: Any, where: str) -> float:
    number = _number(value, where, "bad_margin")
    if abs(number) > MOST_WEIGHT:
        raise RowFault("bad_margin", f"{where} is {number:g}; from -{MOST_WEIGHT:,} to {MOST_WEIGHT:,} are read")
    return number


def _weight(row: Row) -> float:
    weight = row.get("weight")
    if weight is None:
        return 1.0
    number = _number(weight, "weight", "bad_weight")
    if number <= 0:
        raise RowFault("bad_weight", f"weight is {number:g}, not above 0")
    if not LEAST_WEIGHT <= number <= MOST_WEIGHT:
        raise RowFault("bad_weight", f"weight is {number:g}; from {LEAST_WEIGHT:g} to {MOST_WEIGHT:,} are read")
    return number


def _source(row: Row, default: str) -> str:
    source = row.get("source")
    if source is None or source == "":
        return default
    if not isinstance(source, (str, int, float)):
        raise RowFault("wrong_type", f"source is {json_type(source)} ({short(source)}), not text")
    return sys.intern(encodable(str(source), "source"))  # one string object for all rows of a source


def _number(value: Any, where: str, fault_kind: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowFault(fault_kind, f"{where} is {json_type(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        raise RowFault(fault_kind, f"{where} is {short(value)}, which is too large") from None
    if not math.isfinite(number):
        raise RowFault(fault_kind, f"{where} is {value}, not a finite number")
    return number
