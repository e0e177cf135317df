"""The data types that all packages share: a comparison of K responses, and its token ids."""

from dataclasses import dataclass, field
from typing import Any

from qlora_rm.preferences.sizes import size_of

Message = dict[str, Any]
"""A chat turn: at least `role` and `content`."""

Content = str | list[Message] | list[int]
"""Plain text, the turns of a conversation, or the token ids of a row that is already tokenized."""

Pair = tuple[int, int]
"""Indices of two responses of one comparison; in a win the first beats the second."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The location of a row, for messages: `file, row N`, counting from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt and its responses, without preferences: the input of scoring.

    `prompt` and every response are of one kind. A sequence is the prompt followed by a response: texts are
    concatenated, turns are joined before the template is applied, token ids are used unchanged. `prompt` is empty if
    the row does not separate it from the responses.
    """

    prompt: Content
    responses: tuple[Content, ...]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Approximate bytes before tokenization: of the longest sequence, and of all sequences together."""
        shared = size_of(self.prompt) + sum(map(size_of, filter(None, (self.tools, self.template_kwargs))))
        own = [size_of(response) for response in self.responses]
        return shared + max(own), len(own) * shared + sum(own)


@dataclass(frozen=True, slots=True)
class Preferences:
    """Who beats whom among K responses.

    Attributes:
        wins: ordered pairs (winner, loser), each at most once.
        ties: unordered pairs of equals.
        margins: known score difference of each win, one per win, in score units; 0 if unknown.
        weight: factor on this comparison's loss.
        source: name of its data set, for reports per source.
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
    """One prompt, K >= 2 responses, their preferences, and the row they come from."""

    candidates: Candidates
    preferences: Preferences
    origin: Origin


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token sequences of one prompt's candidates.

    Sequence k is `prompt_ids + response_ids[k]`. `prompt_ids` is the longest prefix that all sequences share, so a
    response that is a prefix of all others has empty `response_ids`.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]

    @property
    def sequences(self) -> list[list[int]]:
        return [self.prompt_ids + ids for ids in self.response_ids]
