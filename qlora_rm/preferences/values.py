"""Parsing and checks of a row's values: text, turns or token ids. A fault names its column and JSON type."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_rm.preferences.comparison import Content, Message
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.row_json import parse

Row = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
"""ShareGPT's `from` names that are not role names already."""

MOST_TURNS = 10_000
"""Turns of one conversation; a text prompt is searched for in every user turn."""

SAYS_MORE = ("tool_calls", "reasoning_content", "thinking")
"""A turn with one of these may have no content."""


def json_type(value: Any) -> str:
    """Return JSON's name for the type of `value`, with its article; Python's name if JSON has none, as for bytes."""
    if value is None:
        return "null"
    if not isinstance(value, (bool, int, float, str, Mapping, list, tuple)):
        return f"of type {type(value).__name__}"
    names = ((bool, "a boolean"), (int | float, "a number"), (str, "a string"), (Mapping, "an object"))
    return next((name for kind, name in names if isinstance(value, kind)), "an array")


def kind_of(value: Any) -> str | None:
    """Return "text", "turns" or "ids" by the structure of `value`; None for anything else, including an empty list."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "turns" if _is_turn(value) else None
    if isinstance(value, (list, tuple)) and value:
        if _is_turn(value[0]):
            return "turns"
        return "ids" if type(value[0]) is int else None
    return None


def content(value: Any, column: str) -> Content:
    """Return `value` as checked content.

    Raises:
        RowFault: wrong_type, bad_turn or bad_unicode, naming `column`.
    """
    if isinstance(value, str):
        return encodable(value, column)
    if isinstance(value, Mapping):
        return [_turn(value, f"{column}")]
    if not isinstance(value, (list, tuple)):  # not Sequence, which would include bytes
        raise RowFault("wrong_type", f"{column} is {json_type(value)} ({short(value)}), not text or turns")
    if value and all(type(item) is int for item in value):
        return list(value)
    if value and all(isinstance(item, int | float) for item in value):
        place, wrong = next((i, item) for i, item in enumerate(value) if type(item) is not int)
        raise RowFault("wrong_type", f"{column} holds {short(wrong)} at place {place}, which is no token id")
    if len(value) > MOST_TURNS:
        raise RowFault("too_many_turns", f"{column} holds {len(value):,} turns; at most {MOST_TURNS:,} are read")
    if any(not isinstance(item, Mapping) for item in value):
        raise RowFault("wrong_type", f"{column} is an array of something other than turns or token ids")
    return [_turn(item, f"turn {number} of {column}") for number, item in enumerate(value, start=1)]


def response(value: Any, column: str) -> Content:
    """Return a response as checked content that is neither null nor empty."""
    if value is None:
        raise RowFault("null_response", f"{column} is null")
    found = content(value, column)
    if is_empty(found):
        raise RowFault("empty_response", f"{column} is empty")
    return found


def is_empty(found: Content) -> bool:
    """Return whether content is empty: only white space, no turns, a last turn without content, or no token ids."""
    if isinstance(found, str) or not found:
        return not str(found or "").strip()
    last = found[-1]
    if isinstance(last, int) or any(last.get(key) for key in SAYS_MORE):
        return False
    said = last.get("content")
    return not said.strip() if isinstance(said, str) else not said


def _turn(value: Mapping[str, Any], where: str) -> Message:
    """Return a chat turn in role/content form: from/value turns are converted, other keys are kept for the template."""
    turn = dict(value) if "role" in value else {"role": value.get("from"), "content": value.get("value")}
    if not isinstance(turn["role"], str):
        raise RowFault("bad_turn", f"{where} has no role")
    if "role" not in value:
        turn["role"] = ROLES.get(turn["role"], turn["role"])
    said = turn.get("content")
    if said is None and not any(turn.get(key) for key in SAYS_MORE):
        raise RowFault("bad_turn", f"{where} has no content")
    if isinstance(said, (bool, int, float, Mapping)):
        raise RowFault("wrong_type", f"the content of {where} is {json_type(said)} ({short(said)}), not text")
    if isinstance(said, str):
        encodable(said, where)
    return turn


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def encodable(text: str, where: str) -> str:
    """Return `text` if it can be encoded. JSON can contain a lone surrogate, which no tokenizer accepts.

    Raises:
        RowFault: bad_unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowFault("bad_unicode", f"{where} holds half a surrogate pair at character {error.start}") from None
    return text


def shared_turns(conversations: Sequence[Sequence[Message]]) -> int:
    """Return how many leading turns all conversations have in common."""
    shared = 0
    for turns in zip(*conversations, strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        shared += 1
    return shared


def optional_json(row: Row, column: str, wanted: type, fault_kind: str) -> Any:
    """Return an optional column: a list or object, possibly given as JSON text; None if absent, null or empty."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = parse(value, f"{column} is text that")
        except RowFault as fault:
            raise RowFault(fault_kind, fault.what) from None
    if value is None or value == "":
        return None
    if not isinstance(value, wanted):
        raise RowFault(fault_kind, f"{column} is {json_type(value)}, not {json_type(wanted())}")
    return value


def short(value: Any) -> str:
    """Return the beginning of a value as JSON, for messages."""
    words = json.dumps(value, ensure_ascii=False, default=str)
    return words if len(words) <= 40 else words[:37] + "..."
