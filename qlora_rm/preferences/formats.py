"""The formats of preference rows: recognized by columns and kinds of value, parsed into `Comparison`s.

Each format is one entry of `FORMATS`: a name for the log, the kinds its columns hold, and a function that returns the
prompt and the responses. A row's format is the first entry that fits; a file's is the most frequent of its first rows.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qlora_rm.errors import UserError
from qlora_rm.preferences.comparison import Candidates, Comparison, Origin
from qlora_rm.preferences.hh import hh_turns, is_hh_text
from qlora_rm.preferences.judgements import JUDGEMENTS, pair_preferences, ranked_preferences
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.row_layouts import (
    Parts,
    join,
    read_hh,
    read_ids,
    read_one,
    read_pair,
    read_responses,
    with_system,
)
from qlora_rm.preferences.text_as import TrainedText
from qlora_rm.preferences.values import Row, kind_of, optional_json

COMMON = frozenset({"margin", "weight", "source"})
TURN_COLUMNS = frozenset({"system", "tools", "chat_template_kwargs"})
TEXT, TURNS, IDS = ("text", "hh"), ("turns",), ("ids",)
ANY = ("text", "hh", "turns", "ids", None)  # anything except null

ACCEPTED = """Accepted shapes:
  prompt, chosen, rejected            text, or lists of role/content turns (a text prompt may stand before whole lists)
  chosen, rejected                    text or turns that share a beginning; raw HH text
  conversations, chosen, rejected     ShareGPT: from/value turns and objects
  prompt, responses, and one of       ranks (1 is best), scores (higher is better), preferences ([[winner, loser], ...])
  chosen_ids, rejected_ids            token ids (also input_ids_chosen, chosen_input_ids)
Other column names: --columns field=column, for example prompt=question."""


@dataclass(frozen=True)
class Format:
    """One format of row.

    Attributes:
        name: for the log.
        holds: required column -> kinds of value it may hold.
        read: row -> prompt and responses.
        reads: optional columns that are also read.
    """

    name: str
    holds: dict[str, tuple[str | None, ...]]
    read: Callable[[Row], Parts]
    reads: frozenset[str] = COMMON

    def has_columns(self, row: Row) -> bool:
        return self.holds.keys() <= row.keys()

    def fits(self, row: Row) -> bool:
        return self.has_columns(row) and all(_kind(row[column]) in kinds for column, kinds in self.holds.items())

    def unread(self, rows: Sequence[Row]) -> list[str]:
        """Return the columns of `rows` that this format ignores, in order of appearance."""
        known = self.holds.keys() | self.reads
        return [column for column in dict.fromkeys(column for row in rows for column in row) if column not in known]


def _kind(value: Any) -> str | None:
    if value is None:
        return "null"
    return "hh" if is_hh_text(value) else kind_of(value)


def _ids(chosen: str, rejected: str, *masks: str) -> Format:
    reader = partial(read_ids, chosen=chosen, rejected=rejected)
    return Format(f"token ids ({chosen}, {rejected})", {chosen: IDS, rejected: IDS}, reader, COMMON | {*masks})


def _pairs(name: str, prompt: str | None, prompt_kinds: tuple[str, ...], kinds: tuple[str, ...]) -> Format:
    holds: dict[str, tuple[str | None, ...]] = {"chosen": kinds, "rejected": kinds}
    if prompt:
        holds = {prompt: prompt_kinds, **holds}
    reads = COMMON | (TURN_COLUMNS if "turns" in kinds else frozenset())
    return Format(name, holds, partial(read_pair, prompt=prompt), reads)


FORMATS = (
    _ids("chosen_ids", "rejected_ids"),
    _ids("input_ids_chosen", "input_ids_rejected", "attention_mask_chosen", "attention_mask_rejected"),
    _ids("chosen_input_ids", "rejected_input_ids"),
    *(
        Format(
            f"K responses with {judgement}",
            {"responses": ANY, judgement: ANY},
            read_responses,
            COMMON | TURN_COLUMNS | {"prompt", "ties"},
        )
        for judgement in JUDGEMENTS
    ),
    _pairs("ShareGPT", "conversations", TURNS, (*TEXT, *TURNS)),
    _pairs("prompt text and conversations", "prompt", TEXT, TURNS),
    _pairs("explicit prompt, turns", "prompt", TURNS, (*TEXT, *TURNS)),
    _pairs("explicit prompt, text", "prompt", TEXT, TEXT),
    _pairs("implicit prompt, turns", None, (), TURNS),
    Format("raw HH text", {"chosen": ("hh",), "rejected": ("hh",)}, read_hh),
    _pairs("implicit prompt, text", None, (), TEXT),
)


def recognize(rows: Sequence[Row], file: str) -> Format:
    """Return the format that most of `rows` fit; if none fits, the one with the most required columns among
    those whose columns are present, so that each row reports its own fault.

    Raises:
        UserError: no format has these columns.
    """
    fitting = (next((form for form in FORMATS if form.fits(row)), None) for row in rows)
    votes = Counter(form.name for form in fitting if form is not None)
    if votes:
        name = votes.most_common(1)[0][0]
        return next(form for form in FORMATS if form.name == name)
    by_columns = (form for row in rows for form in reversed(FORMATS) if form.has_columns(row))
    found = max(by_columns, key=lambda form: len(form.holds), default=None)
    if found is None:
        columns = ", ".join(dict.fromkeys(column for row in rows for column in row)) or "none"
        raise UserError(f"{file}: the rows have no known format. Columns found: {columns}. {ACCEPTED}")
    return found


def parse_comparison(
    row: Row, form: Format, origin: Origin, source: str, as_turns: bool = False, text: TrainedText | None = None
) -> Comparison:
    """Parse `row` as `form`.

    Arguments:
        source: name of the data set, used if the row has no `source` of its own.
        as_turns: parse raw HH text into turns.
        text: how the model that scores the row reads plain text; None leaves it unchanged.

    Raises:
        RowFault: the row is not a valid comparison.
    """
    if missing := [column for column in form.holds if column not in row]:
        raise RowFault("missing_column", f"no {' and no '.join(missing)}, which rows of {form.name} have")
    candidates = _candidates(row, form.read(row), as_turns, text)
    count = len(candidates.responses)
    if count < 2:
        raise RowFault("too_few_responses", f"responses holds {count}, at least 2 are compared")
    if all(response == candidates.responses[0] for response in candidates.responses):
        raise RowFault("identical_responses", "the responses are identical")
    if "responses" in form.holds:
        return Comparison(candidates, ranked_preferences(row, count, source), origin)
    return Comparison(candidates, pair_preferences(row, source), origin)


SCORED = (
    Format("messages", {"messages": TURNS}, partial(read_one, column="messages"), TURN_COLUMNS),
    Format(
        "prompt and response", {"prompt": ANY, "response": ANY}, partial(read_one, column="response", prompt="prompt")
    ),
    Format("responses", {"responses": ANY}, read_responses),
    Format("response", {"response": ANY}, partial(read_one, column="response")),
    Format("text", {"text": TEXT}, partial(read_one, column="text")),
)
"""Formats of rows that are scored without preferences."""


def parse_candidates(row: Row, as_turns: bool = False, text: TrainedText | None = None) -> Candidates:
    """Parse a prompt and its responses to score.

    Rows are {prompt, response}, {prompt, responses}, {messages}, {text}, {response}, or any of `FORMATS`, whose
    preferences are ignored. Arguments as for `parse_comparison`.

    Raises:
        RowFault: missing_column if no format fits, else the faults of the values.
    """
    shapes = (*SCORED, *FORMATS)
    form = next((form for form in shapes if form.fits(row)), None)
    form = form or next((form for form in shapes if form.has_columns(row)), None)
    if form is None:
        raise RowFault(
            "missing_column",
            f"nothing to score in the columns {', '.join(row) or 'none'}; give prompt and response, prompt and "
            "responses, messages, or prompt, chosen and rejected",
        )
    return _candidates(row, form.read(row), as_turns, text)


def _candidates(row: Row, parts: Parts, as_turns: bool, text: TrainedText | None) -> Candidates:
    prompt, responses = parts
    if as_turns and isinstance(prompt, str) and is_hh_text(f"{prompt}{responses[0]}"):
        prompt, responses = join("", [hh_turns(f"{prompt}{response}") for response in responses])
    if text is not None:
        prompt, responses = text.read(prompt, responses)
    if kind_of(responses[0]) != "turns":
        return Candidates(prompt, tuple(responses))
    return Candidates(
        prompt=with_system(prompt, row.get("system")),
        responses=tuple(responses),
        tools=optional_json(row, "tools", list, "bad_tools"),
        template_kwargs=optional_json(row, "chat_template_kwargs", dict, "bad_template_kwargs") or {},
    )
