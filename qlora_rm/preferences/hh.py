"""Parsing of raw HH text, as Anthropic published it: `\\n\\nHuman: ... \\n\\nAssistant: ...` in one string."""

import re
from collections.abc import Sequence

from qlora_rm.preferences.comparison import Message
from qlora_rm.preferences.prefixes import shared_length
from qlora_rm.preferences.row_errors import RowFault

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_LAST = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_hh_text(value: object) -> bool:
    """Return whether `value` is text that starts with a human turn and contains an assistant turn."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and _LAST in value


def hh_turns(text: str) -> list[Message]:
    """Return the turns of raw HH text, each stripped of surrounding white space."""
    before, *pieces = _MARKER.split(text)
    if before.strip() or not pieces:
        raise RowFault("bad_turn", "the text does not begin with '\\n\\nHuman:'")
    return [
        {"role": _ROLES[name], "content": said.strip()} for name, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def hh_prompt(texts: Sequence[str]) -> str:
    """Return the prefix that all texts share, through its last `Assistant:`; empty if it contains none.

    Raises:
        RowFault: empty_response, if a text ends with a bare `Assistant:`.
    """
    for text in texts:
        if not text.rpartition(_LAST)[2].strip():
            raise RowFault("empty_response", "the last Assistant turn is empty")
    before, marker, _ = texts[0][: shared_length(texts)].rpartition(_LAST)
    return before + marker
