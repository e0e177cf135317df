"""Token ids, as in training, for a policy's decoded text with its special tokens spelled out.

Consumers without turns (OpenRLHF, verl) send a conversation as one text, whose beginning and end differ from training.
Their tokenizer adds or strips bos; a policy stops at its eos where the template writes a line break after it; an answer
cut at the length limit has no end. This module restores the beginning and end that training always wrote, once each.
"""

import os
import re

from qlora_rm.errors import UserError
from qlora_rm.preferences.comparison import Candidates
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.tokenization import Tokenization


class DecodedText:
    """A converter from decoded text to token ids.

    Arguments:
        as_turns: True if the model was trained on conversations: the text is the chat template's rendering, and begins
            and ends as the template writes it. False for plain text: the tokenizer adds the beginning, and eos ends it.

    Raises:
        UserError: `as_turns` without a chat template that renders a question and an answer.
    """

    def __init__(self, tokenization: Tokenization, as_turns: bool) -> None:
        self.tokenization, self.as_turns = tokenization, as_turns
        tokenizer = tokenization.tokenizer
        bos, eos, pad = tokenizer.bos_token or "", tokenizer.eos_token or "", tokenizer.pad_token or ""
        if as_turns:
            renderings = _two_renderings(tokenization)
            self._begin = bos if renderings[0].startswith(bos) else ""
            self._end = os.path.commonprefix([text[::-1] for text in renderings])[::-1]
            bos_is_known = bool(self._begin) or bos != eos
        else:
            self._begin, self._end = "", eos
            bos_is_known = tokenizer.bos_token_id in tokenization.encode(["a"], add_special_tokens=True)[0]
        # keep a leading bos where training writes none: it may be content, as in GPT-2, whose bos is also its eos
        self._first = re.compile(f"^{_any_of(pad, bos if bos_is_known else '')}*")
        self._last = tuple(filter(None, (pad, eos)))
        self._end_is_eos = self._end == eos
        whole = _any_of(*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        self._pieces = [piece for piece in re.split(f"({whole})", self._end) if piece]

    def candidates(self, text: str) -> Candidates:
        """Return `text` as a single sequence of token ids; the over-long rule is not yet applied.

        Raises:
            RowFault: empty_sequence.
        """
        ids = self.tokenization.encode([self.completed(text)], add_special_tokens=not self.as_turns)[0]
        if not ids:
            raise RowFault("empty_sequence", "the text has no tokens")
        return Candidates([], (ids,))

    def completed(self, text: str) -> str:
        """Return `text` with the beginning and end that training gave every text of its kind."""
        text = self._first.sub("", text)
        if self._end and not self._end_is_eos and text.endswith(self._end):
            return self._begin + text  # everything before the end is content
        text = self._without_last(text)
        for count in range(len(self._pieces), 0, -1):
            if text.endswith("".join(self._pieces[:count])):
                return self._begin + text + "".join(self._pieces[count:])
        return self._begin + text + self._end

    def _without_last(self, text: str) -> str:
        """Return `text` without the eos or pad tokens at its end, of which a policy may write many.

        A loop removes them one by one: a regular expression would search for the end after each of many in a long text.
        """
        end = len(text)
        while mark := next((mark for mark in self._last if text.endswith(mark, 0, end)), None):
            end -= len(mark)
        return text[:end]


def _any_of(*tokens: str) -> str:
    """Return a pattern that matches one of `tokens`, the longest first; the empty string if there are none."""
    return f"(?:{'|'.join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True)))})"


def _two_renderings(tokenization: Tokenization) -> list[str]:
    """Render a question with each of two answers that have nothing in common."""
    turns = [{"role": "user", "content": "Why?"}], tuple([{"role": "assistant", "content": said}] for said in "xy")
    try:
        return tokenization.texts(Candidates(*turns))
    except RowFault as fault:
        raise UserError(f"{fault.what}: it must render a user's question and the assistant's answer.") from fault
