"""Scoring of rows: every row is returned in order with its scores; faulty rows stop the run or are marked."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.errors import UserError
from qlora_rm.preferences import Candidates, RowFault, parse_candidates
from qlora_rm.preferences.file_formats import MAX_ROW_BYTES, row_of
from qlora_rm.preferences.portions import portions
from qlora_rm.preferences.row_bytes import too_long
from qlora_rm.preferences.text_as import TrainedText

SCORED_AT_ONCE = 256
BYTES_AT_ONCE = 4_000_000

Line = str | bytes | RowFault
"""A line of JSON, or its fault."""


def score_rows(
    model: RewardModel,
    lines: Iterable[str | bytes | None],
    file: str,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    column: str | None = None,
    hh_turns: bool = False,
    skipped: Counter[str] | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Iterator[dict[str, Any]]:
    """Yield each JSON line's row with its scores: a number for one response, a list for several.

    Arguments:
        lines: None represents a line of more than `max_row_bytes`.
        file: name of the lines' source, for messages.
        on_bad_row: "skip" gives a faulty row a null score and an `error`; "error" stops there.
        column: name of the added column; unset: `score` or `scores`. A row that already has it stops the run.
        hh_turns: read raw HH text as turns.
        skipped: counts faulty rows by kind.

    Raises:
        UserError: a faulty row under "error", naming file and row; or no row at all.
    """
    numbered = (
        (number, too_long(max_row_bytes) if line is None else line)
        for number, line in enumerate(lines, start=1)
        if line is None or line.strip()
    )
    skipped = Counter() if skipped is None else skipped
    empty = True
    for chunk in portions(numbered, _length, SCORED_AT_ONCE, BYTES_AT_ONCE):
        empty = False
        results = _scored(model, [line for _, line in chunk], column, hh_turns)
        for (number, _), (row, result) in zip(chunk, results, strict=True):
            if not isinstance(result, RowFault):
                yield row | result
                continue
            if on_bad_row == "error" or result.kind == "column_taken":
                raise result.at(f"{file}, row {number}")
            skipped[result.kind] += 1
            yield row | {column or "score": None, "error": f"row {number}: {result.what}"}
    if empty:
        raise UserError(f"{file} holds no rows.")


def rank(model: RewardModel, prompt: str, responses: Sequence[str], hh_turns: bool = False) -> list[tuple[float, str]]:
    """Return the responses to one prompt with their scores, best first.

    The prompt is a user turn if the model was trained on turns, otherwise text before each response.

    Raises:
        UserError: a response is empty or exceeds the model's length.
    """
    try:
        candidates = parse_candidates({"prompt": prompt, "responses": list(responses)}, hh_turns, model.text)
    except RowFault as fault:
        raise UserError(f"{fault.what}.") from fault
    scores = model.score_candidates([candidates])[0]
    return sorted(zip(scores, responses, strict=True), key=lambda item: -item[0])


def _scored(
    model: RewardModel, lines: Sequence[Line], column: str | None, hh_turns: bool
) -> list[tuple[dict[str, Any], dict[str, Any] | RowFault]]:
    """Return each line's row (empty if it is not valid) and its new column, or its fault."""
    rows = [_parsed(line, column, hh_turns, model.text) for line in lines]
    good = (candidates for _, candidates in rows if isinstance(candidates, Candidates))
    groups = portions(good, lambda candidates: candidates.size[1], SCORED_AT_ONCE, BYTES_AT_ONCE)
    results = chain.from_iterable(_within_memory(model, group) for group in groups)
    scored: list[tuple[dict[str, Any], dict[str, Any] | RowFault]] = []
    for row, candidates in rows:
        result = next(results) if isinstance(candidates, Candidates) else candidates
        if isinstance(result, RowFault):
            scored.append((row, result))
        elif not all(map(math.isfinite, result)):
            scored.append(
                (row, RowFault("not_finite", "its score is not a number", "Check the model by `qlora-rm verify`."))
            )
        elif len(result) == 1 and "responses" not in row:
            scored.append((row, {column or "score": result[0]}))
        else:
            scored.append((row, {column or "scores": result}))
    return scored


def _length(item: tuple[int, Line]) -> int:
    return 0 if isinstance(item[1], RowFault) else len(item[1])


def _within_memory(model: RewardModel, candidates: list[Candidates]) -> list[list[float] | RowFault]:
    """Return the scores of each prompt's responses.

    When memory runs out, retry with halves of the batch, so that only a prompt that is too long alone is a fault.
    """
    try:
        return model.score_or_fault(candidates)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
            raise
        if len(candidates) <= 1:
            hint = "Shorten the row, lower --tokens_per_batch, or pass --on_bad_row skip to go on without it."
            return [RowFault("out_of_memory", "memory runs out when the row is scored", hint)]
    clear_device_cache()
    middle = len(candidates) // 2
    return _within_memory(model, candidates[:middle]) + _within_memory(model, candidates[middle:])


def _parsed(
    line: Line, column: str | None, hh_turns: bool, text: TrainedText
) -> tuple[dict[str, Any], Candidates | RowFault]:
    row = line if isinstance(line, RowFault) else row_of(line)
    if isinstance(row, RowFault):
        return {}, row
    if not _is_json(row):
        return {}, RowFault(
            "broken_json", "the row is not JSON: it holds NaN or Infinity, or a number too large for one"
        )
    if taken := ({column} if column else {"score", "scores"}) & row.keys():
        way_out = "Name another column for the model's scores by --score_column."
        return row, RowFault("column_taken", f"the row already has a column {min(taken)!r}", way_out)
    try:
        return row, parse_candidates(row, hh_turns, text)
    except RowFault as fault:
        return row, fault


def _is_json(row: dict[str, Any]) -> bool:
    """Return whether the row can be written as JSON again; Python also parses numbers that JSON does not allow."""
    try:
        json.dumps(row, allow_nan=False)
    except ValueError:
        return False
    return True
