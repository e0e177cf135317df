"""How much text one request may hold, checked before anything is tokenized.

A text is never shortened before it is tokenized: tokens do not stand for fixed pieces of text, so that the cut of training
(`Tokenization`) could fall elsewhere. It is tokenized whole or refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from qlora_rm.preferences import Tokenization
from qlora_rm.preferences.tokenization import CHARACTERS_PER_TOKEN

PER_TOKEN_OF_REQUEST = 16
"""Characters for each token that a whole request may have. Text has about four."""
PER_VALUE = 8
"""Characters that a value of JSON counts beside its text: a turn costs time even when it is empty."""


class Refused(Exception):
    """A request that is not scored: its status, and why, for whoever sent it."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Long(Exception):
    """A request has more to tokenize than a short one may; `cost`: so many characters."""

    def __init__(self, cost: int) -> None:
        super().__init__(cost)
        self.cost = cost


@dataclass(frozen=True)
class Sizes:
    """Characters that one sequence and one request may hold; a token id counts as one, None is no bound.

    Attributes:
        why: where the bound of a sequence comes from, in words.
    """

    sequence: int | None
    request: int
    why: str

    @classmethod
    def of(cls, tokenization: Tokenization, longest: int | None, max_tokens: int) -> Self:
        """The bounds for a model that takes sequences of `longest` tokens, and for requests of `max_tokens`."""
        token = max(CHARACTERS_PER_TOKEN, max(map(len, tokenization.tokenizer.get_vocab()), default=0))
        request = PER_TOKEN_OF_REQUEST * max_tokens
        if longest is None:
            return cls(None, request, "")
        return cls(longest * token, request, f"{longest} tokens of {token}")

    def check(self, sequences: Iterable[tuple[str, int]], short: int | None) -> None:
        """Check the name and the characters of each sequence.

        Arguments:
            short: characters of all sequences together, beyond which `Long` is raised; None for no such bound.

        Raises:
            Refused: a sequence is too long, or all are together.
            Long: as above.
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


def size_of(value: Any) -> int:
    """Characters of all text in a value of JSON, and some for each value itself; a list of token ids counts one for each."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        if all(type(part) is int for part in value):
            return len(value)
        return sum(PER_VALUE + size_of(part) for part in value)
    if isinstance(value, dict):
        return sum(PER_VALUE + len(key) + size_of(part) for key, part in value.items())
    return 0
