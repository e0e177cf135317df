"""How a trained model reads a prompt and its responses: plain text as turns or as text, depending on its training.

Every command that scores calls `TrainedText.read`; no other code decides this. The rules, each reported at most once:

| model trained on | row | read as |
|---|---|---|
| turns | text with a prompt | a user's turn and an assistant's turn |
| turns | text that the chat template wrote | that conversation, by its token ids |
| turns | text without a prompt, raw HH text | text, with a warning |
| text, or text and turns | text | text: prompt + response, as training joined them |
| text | turns | as the chat template writes them, with a warning; a fault if there is no template |
| token ids | text | text, with a warning |

Token ids are never changed.
"""

import os
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Literal

from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.preferences.comparison import Candidates, Content
from qlora_rm.preferences.decoded import DecodedText
from qlora_rm.preferences.hh import is_hh_text
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.row_layouts import Parts, join
from qlora_rm.preferences.tokenization import Tokenization
from qlora_rm.preferences.values import kind_of

Kind = Literal["text", "turns", "token_ids"]
TextAs = Literal["text", "turns"]

TO_TURNS = "text is scored as a user's turn (the prompt) and an assistant's turn (the response): the model {reason}"
FROM_TEMPLATE = "text that the chat template wrote is scored as the conversation it spells"
NO_PROMPT = (
    "warning: the model {reason}, and some text has no prompt apart from its response: such text is scored "
    "as it is. Give prompt and response, or turns."
)
RAW_HH = (
    "warning: the model {reason}, and some text is raw HH text: it is scored as it is. "
    "Give turns; --hh_turns of eval and score makes them."
)
TURNS_FOR_TEXT = (
    "warning: the model was trained on text, and some rows are turns: they are scored as the chat template writes them, "
    "which training did not see. Give prompt and response as text."
)
TEXT_FOR_IDS = (
    "warning: the model was trained on token ids, which do not say how text became them: text is scored as prompt + "
    "response. Give token ids."
)
MIXED = "text is scored as text: the model was trained on text and on turns, and on each as it came"


def kind_of_row(candidates: Candidates) -> Kind:
    """Return the kind of a row's prompt and responses."""
    kind = kind_of(candidates.responses[0])
    return "turns" if kind == "turns" else "token_ids" if kind == "ids" else "text"


def text_as_of(trained_on: Collection[str]) -> TextAs:
    """Return how a model trained on rows of these kinds reads a prompt and a response in plain text."""
    return "turns" if "turns" in trained_on and "text" not in trained_on else "text"


class TrainedText:
    """The rules by which one model reads rows.

    Arguments:
        text_as: what a prompt and a response in plain text are scored as.
        trained_on: the kinds of its training rows; empty if unknown.
        tell: called once with each note and warning.
    """

    def __init__(
        self,
        tokenization: Tokenization,
        text_as: TextAs,
        trained_on: Collection[str] = (),
        tell: Callable[[str], None] = say,
    ) -> None:
        self.tokenization, self.text_as, self.trained_on = tokenization, text_as, frozenset(trained_on)
        self._tell, self._told = tell, set[str]()
        self._reason = "was trained on turns" if self.trained_on else "has a chat template"

    @property
    def decodes_turns(self) -> bool:
        """Whether a policy's decoded text is the chat template's rendering, not plain text."""
        return "turns" in self.trained_on or self.text_as == "turns"

    @cached_property
    def decoded(self) -> DecodedText:
        """The converter of a policy's decoded text."""
        return DecodedText(self.tokenization, self.decodes_turns)

    def read(self, prompt: Content, responses: list[Content]) -> Parts:
        """Convert a prompt and its responses, all of one kind, to the model's input.

        Raises:
            RowFault: turns_without_template.
        """
        kind = kind_of(responses[0])
        if kind == "turns":
            self._check_turns()
        elif kind != "ids":
            return self._read_text(str(prompt), [str(text) for text in responses])
        return prompt, responses

    def _check_turns(self) -> None:
        if self.tokenization.tokenizer.chat_template is None:
            raise RowFault(
                "turns_without_template",
                "the row is a conversation, and the model has no chat template: it was trained on text",
                "Give prompt and response as text.",
            )
        if self.trained_on == {"text"}:
            self._say_once(TURNS_FOR_TEXT)

    def _read_text(self, prompt: str, responses: list[str]) -> Parts:
        whole = prompt + responses[0]
        if self.text_as == "text":
            if self.trained_on and "text" not in self.trained_on:
                self._say_once(TEXT_FOR_IDS)
            elif "turns" in self.trained_on:
                self._say_once(MIXED)
        elif is_hh_text(whole):
            self._warn_of_text(RAW_HH)
        elif self._is_rendered(whole):
            self._say_once(FROM_TEMPLATE)
            return [], [self.decoded.candidates(prompt + text).responses[0] for text in responses]
        elif prompt:
            self._say_once(TO_TURNS.format(reason=self._reason))
            return join([{"role": "user", "content": prompt}], [*responses])
        else:
            self._warn_of_text(NO_PROMPT)
        return prompt, [*responses]

    def _warn_of_text(self, line: str) -> None:
        if "text" not in self.trained_on:
            self._say_once(line.format(reason=self._reason))

    def _say_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._tell(line)

    def _is_rendered(self, text: str) -> bool:
        bos = self.tokenization.tokenizer.bos_token or ""
        return text.removeprefix(bos).startswith(self._beginnings) if self._beginnings else False

    @cached_property
    def _beginnings(self) -> tuple[str, ...]:
        """The texts that the chat template writes before the content of a user or system turn, without bos.

        A text that begins with an added token is cut after it, so that default system prompts may differ.
        """
        tokenizer = self.tokenization.tokenizer
        bos = tokenizer.bos_token or ""
        added = tuple(token for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if token != bos)
        found = []
        for before in ([{"role": "user"}], [{"role": "system"}, {"role": "user", "content": "Why?"}]):
            try:
                texts = [
                    self.tokenization.texts(
                        Candidates(
                            [before[0] | {"content": said}, *before[1:]], ([{"role": "assistant", "content": "So."}],)
                        )
                    )[0]
                    for said in ("Why is it so?", "Be brief.")
                ]
            except (RowFault, UserError):  # few templates support every role
                continue
            start = os.path.commonprefix(texts).removeprefix(bos)
            found.append(max((token for token in added if start.startswith(token)), key=len, default=start))
        return tuple(filter(None, found))
