"""Conversion of a row's columns to a prompt and its responses, all of one kind."""

from collections.abc import Mapping
from typing import Any

from qlora_rm.preferences.comparison import Content, Message
from qlora_rm.preferences.hh import hh_prompt
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.values import Row, content, json_type, kind_of, response, shared_turns

Parts = tuple[Content, list[Content]]
"""A prompt and its responses."""


def read_ids(row: Row, chosen: str, rejected: str) -> Parts:
    """Read a tokenized pair. Its prompt is empty here; tokenization finds it as the shared prefix of the ids."""
    return [], [_unpadded(row, chosen), _unpadded(row, rejected)]


def _unpadded(row: Row, column: str) -> Content:
    """Return token ids; if the row has an attention mask, as older TRL wrote, remove the padding."""
    ids = response(row[column], column)
    if kind_of(ids) != "ids":
        raise RowFault("wrong_type", f"{column} does not hold token ids")
    mask = row.get(column.replace("input_ids", "attention_mask")) if column.startswith("input_ids") else None
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise RowFault("wrong_type", f"the attention mask of {column} is not as long as its token ids")
    if any(attended not in (0, 1) for attended in mask):
        raise RowFault("wrong_type", f"the attention mask of {column} holds something other than 0 and 1")
    return [int(token) for token, attended in zip(ids, mask, strict=True) if attended]  # type: ignore[call-overload]


def read_responses(row: Row) -> Parts:
    """Read K responses in a list, with or without a prompt."""
    values = row["responses"]
    if not isinstance(values, list):
        raise RowFault("wrong_type", f"responses is {json_type(values)}, not an array")
    if not values:
        raise RowFault("empty_response", "responses is an empty array")
    responses = [response(value, f"responses[{index}]") for index, value in enumerate(values)]
    return join(_prompt(row, "prompt" if "prompt" in row else None), responses)


def read_pair(row: Row, prompt: str | None = None) -> Parts:
    """Read `chosen` and `rejected`, which follow the prompt in column `prompt` or contain it."""
    responses = [response(row[column], column) for column in ("chosen", "rejected")]
    return join(_prompt(row, prompt), responses)


def read_one(row: Row, column: str, prompt: str | None = None) -> Parts:
    """Read a single response, for scoring."""
    return join(_prompt(row, prompt), [response(row[column], column)])


def read_hh(row: Row) -> Parts:
    """Read raw HH text as text, split after the last `Assistant:` that both share."""
    texts = [response(row[column], column) for column in ("chosen", "rejected")]
    for column, text in zip(("chosen", "rejected"), texts, strict=True):
        if not isinstance(text, str):
            raise RowFault("wrong_type", f"{column} is {json_type(row[column])}, not text")
    prompt = hh_prompt(texts)  # type: ignore[arg-type]
    return prompt, [text[len(prompt) :] for text in texts]


def _prompt(row: Row, column: str | None) -> Content:
    if column is None:
        return ""
    if row[column] is None:
        raise RowFault("wrong_type", f"{column} is null, not text or turns")
    return content(row[column], column)


def join(prompt: Content, responses: list[Content]) -> Parts:
    """Return a prompt and responses of one kind: after turns, a text response becomes an assistant turn.

    Raises:
        RowFault: wrong_type if the kinds do not match, and the faults of `_conversations`.
    """
    kinds = {kind_of(found) for found in responses}
    prompt_kind = kind_of(prompt) if prompt else None
    if prompt_kind == "turns" and "ids" not in kinds:
        return prompt, [_assistant_turn(found) for found in responses]
    if len(kinds) > 1 or (prompt_kind != "ids" if kinds == {"ids"} and prompt_kind else prompt_kind == "ids"):
        found = " and ".join(sorted(str(kind) for kind in kinds | ({prompt_kind} if prompt else set())))
        raise RowFault("wrong_type", f"the row mixes {found}")
    if kinds == {"turns"}:
        return _conversations(prompt, responses)
    return prompt or ([] if kinds == {"ids"} else ""), responses


def _assistant_turn(found: Content) -> Content:
    return [{"role": "assistant", "content": found}] if isinstance(found, str) else found


def _conversations(prompt: Any, lists: list[Any]) -> Parts:
    """Combine lists of turns with a text prompt, which may be empty.

    Complete conversations (UltraFeedback, TRL's version of HH) repeat the prompt in their shared turns and are not
    changed. Lists that only continue the prompt get it as a user turn. A single list is split before its last turn.
    """
    if len(lists) > 1 and all(turns == lists[0] for turns in lists):
        raise RowFault("identical_responses", "the responses are identical")
    shared = shared_turns(lists) if len(lists) > 1 else len(lists[0]) - 1
    if any(len(turns) == shared for turns in lists):
        raise RowFault("empty_response", "one conversation ends where another goes on: its response is empty")
    turns: list[Message] = lists[0][:shared]
    responses: list[Content] = [turns[shared:] for turns in lists]
    words = prompt.strip() if isinstance(prompt, str) else ""
    users = [str(turn.get("content")).strip() for turn in turns if turn["role"] == "user"]
    if not words or any(said and (said in words or words in said) for said in users):
        return turns, responses
    if users or any(turn["role"] == "user" for turns in lists for turn in turns):
        raise RowFault("prompt_mismatch", "prompt stands in none of the user turns that the responses share")
    return [*turns, {"role": "user", "content": prompt}], responses


def with_system(prompt: Content, system: Any) -> Content:
    """Insert the `system` column as the first turn, unless the conversation already begins with it."""
    if system is None or system == "" or isinstance(prompt, str):
        return prompt
    if not isinstance(system, str):
        raise RowFault("wrong_type", f"system is {json_type(system)}, not text")
    first = prompt[0] if prompt else None
    if isinstance(first, Mapping) and first["role"] == "system":
        if first["content"] != system:
            raise RowFault("bad_turn", "the system column and the conversation's own system turn differ")
        return prompt
    return [{"role": "system", "content": system}, *prompt]
