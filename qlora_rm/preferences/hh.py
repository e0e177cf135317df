"""Raw HH text, as Anthropic published it: `\\n\\nHuman: ... \\n\\nAssistant: ...` in one string."""

import re
from collections.abc import Sequence

from qlora_rm.preferences.comparison import Message
from qlora_rm.preferences.prefixes import shared_length
from qlora_rm.preferences.row_errors import RowFault

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_LAST = "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_hh_text(value: object) -> bool:
    """Text that opens with a human turn and holds an assistant turn."""
    return isinstance(value, str) and value.startswith("\n\nHuman:") and _LAST in value


def hh_turns(text: str) -> list[Message]:
    """The turns of raw HH text, each stripped of the white space around it."""
    before, *pieces = _MARKER.split(text)
    if before.strip() or not pieces:
        raise RowFault("bad_turn", "the text does not begin with '\\n\\nHuman:'")
    return [
        {"role": _ROLES[name], "content": said.strip()} for name, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def hh_prompt(texts: Sequence[str]) -> str:
    """The beginning that all texts share, up to and with the last `Assistant:` in it; empty where they share none.

    Raises:
        RowFault: empty_response, where a text ends with a bare `Assistant:` and the assistant says nothing.
    """
    for text in texts:
        if not text.rpartition(_LAST)[2].strip():
            raise RowFault("empty_response", "the last Assistant turn is empty")
    before, marker, _ = texts[0][: shared_length(texts)].rpartition(_LAST)
    return before + marker
