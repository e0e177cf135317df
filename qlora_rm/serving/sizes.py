"""Limit the text of one request, before anything is tokenized.

A text is never shortened before tokenization. Tokens do not correspond to fixed pieces of text, so the cut of training
(`Tokenization`) could fall elsewhere. A text is tokenized in full or refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from qlora_rm.preferences import Tokenization
from qlora_rm.preferences.tokenization import CHARACTERS_PER_TOKEN

PER_TOKEN_OF_REQUEST = 16
"""Most characters per token of a full request. Text has about four."""
PER_VALUE = 8
"""Characters counted for each JSON value in addition to its text, because even an empty turn costs time."""


class Refused(Exception):
    """A request that is not scored, with the status and the reason for its client."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Long(Exception):
    """A request has more to tokenize than a short one may: `cost` characters."""

    def __init__(self, cost: int) -> None:
        super().__init__(cost)
        self.cost = cost


@dataclass(frozen=True)
class Sizes:
    """The most characters of one sequence and of one request. A token id counts as one; None is no limit.

    Attributes:
        why: the origin of the limit of a sequence, in words.
    """

    sequence: int | None
    request: int
    why: str

    @classmethod
    def of(cls, tokenization: Tokenization, longest: int | None, max_tokens: int) -> Self:
        """Return the limits for a model that takes sequences of `longest` tokens and requests of `max_tokens`."""
        token = max(CHARACTERS_PER_TOKEN, max(map(len, tokenization.tokenizer.get_vocab()), default=0))
        request = PER_TOKEN_OF_REQUEST * max_tokens
        if longest is None:
            return cls(None, request, "")
        return cls(longest * token, request, f"{longest} tokens of {token}")

    def check(self, sequences: Iterable[tuple[str, int]], short: int | None) -> None:
        """Check the name and the characters of each sequence.

        Arguments:
            short: characters of all sequences together above which `Long` is raised; None for no limit.

        Raises:
            Refused: one sequence is too long, or all of them together are.
            Long: see `short`.
        """
        total = 0
        for place, size in sequences:
            if self.sequence is not None and size > self.sequence:
                raise Refused(413, f"{place}: {size} characters; at most {self.sequence} are taken ({self.why})")
            total += size
        if total > self.request:
            what = "to tokenize, each prompt counted once for each response"
            raise Refused(413, f"{total} characters {what}; at most {self.request} are taken in one request")
        if short is not None and total > short:
            raise Long(total)


def characters_of(value: Any) -> int:
    """Count the characters of all text in a JSON value, plus `PER_VALUE` for each value. Token ids in a list count one each."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        if all(type(part) is int for part in value):
            return len(value)
        return sum(PER_VALUE + characters_of(part) for part in value)
    if isinstance(value, dict):
        return sum(PER_VALUE + len(key) + characters_of(part) for key, part in value.items())
    return 0
