"""The nouns every other room speaks: a comparison of K responses, and the same in token ids."""

from dataclasses import dataclass, field
from typing import Any

from qlora_rm.preferences.sizes import size_of

Message = dict[str, Any]
"""A chat turn: at least `role` and `content`."""

Content = str | list[Message] | list[int]
"""Plain text, the turns of a conversation, or token ids of rows that come tokenized."""

Pair = tuple[int, int]
"""Indices of two responses of one comparison; in a win the first beats the second."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands, for messages: `file, row N` counting from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt and its responses, not yet compared: what is scored.

    `prompt` and every response are of one kind, and the sequence is the prompt followed by the response: text by
    concatenation, turns before the template is applied, token ids as they are. `prompt` is empty where the row does
    not tell it apart from the responses.
    """

    prompt: Content
    responses: tuple[Content, ...]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """About how many bytes the longest sequence has before it is tokenized, and all sequences together."""
        shared = size_of(self.prompt) + sum(map(size_of, filter(None, (self.tools, self.template_kwargs))))
        own = [size_of(response) for response in self.responses]
        return shared + max(own), len(own) * shared + sum(own)


@dataclass(frozen=True, slots=True)
class Preferences:
    """Who beats whom among K responses.

    Attributes:
        wins: ordered pairs (winner, loser), each at most once.
        ties: unordered pairs of equals.
        margins: by how much each win is known to be won, one per win, in score units; 0 where unknown.
        weight: factor on this comparison's loss.
        source: name of the dataset it comes from, for reports per source.
    """

    wins: tuple[Pair, ...]
    ties: tuple[Pair, ...] = ()
    margins: tuple[float, ...] = ()
    weight: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        if not self.margins:
            object.__setattr__(self, "margins", (0.0,) * len(self.wins))
        assert len(self.margins) == len(self.wins)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, K >= 2 responses, who beats whom, and where that is written."""

    candidates: Candidates
    preferences: Preferences
    origin: Origin


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token sequences of one prompt's candidates.

    Sequence k is `prompt_ids + response_ids[k]`. `prompt_ids` is the longest beginning that all sequences share, so
    a response that is the beginning of another has empty `response_ids`.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]

    @property
    def sequences(self) -> list[list[int]]:
        return [self.prompt_ids + ids for ids in self.response_ids]
