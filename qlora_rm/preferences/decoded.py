"""From text as a policy decodes it, its special tokens spelled out, back to the token ids of training.

Readers that hold no turns (OpenRLHF, verl) send a conversation as one text. Its ends differ from what training saw: a
tokenizer of theirs adds or strips bos, a policy stops at its eos where the template goes on with a line break, an answer
cut at the length limit has no end at all. What training always wrote is therefore put back, and nothing twice.
"""

import os
import re

from qlora_rm.errors import UserError
from qlora_rm.preferences.comparison import Candidates
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.tokenization import Tokenization


class DecodedText:
    """How decoded text is tokenized.

    Arguments:
        as_turns: the model was trained on conversations, so that the text is the chat template's rendering, which
            begins and ends as the template writes it; else plain text, which the tokenizer begins and eos ends.

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
        # a token that training puts at no beginning may be meant where it also ends texts (GPT-2 has only that one)
        self._first = re.compile(f"^{_any_of(pad, bos if bos_is_known else '')}*")
        self._last = tuple(filter(None, (pad, eos)))
        self._end_is_eos = self._end == eos
        whole = _any_of(*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        self._pieces = [piece for piece in re.split(f"({whole})", self._end) if piece]

    def candidates(self, text: str) -> Candidates:
        """`text` as a single sequence of token ids, to which the over-long rule still applies.

        Raises:
            RowFault: empty_sequence.
        """
        ids = self.tokenization.encode([self.completed(text)], add_special_tokens=not self.as_turns)[0]
        if not ids:
            raise RowFault("empty_sequence", "the text has no tokens")
        return Candidates([], (ids,))

    def completed(self, text: str) -> str:
        """`text` between the beginning and the end that training gave every text of its kind."""
        text = self._first.sub("", text)
        if self._end and not self._end_is_eos and text.endswith(self._end):
            return self._begin + text  # whatever stands before the end was said
        text = self._without_last(text)
        for count in range(len(self._pieces), 0, -1):
            if text.endswith("".join(self._pieces[:count])):
                return self._begin + text + "".join(self._pieces[count:])
        return self._begin + text + self._end

    def _without_last(self, text: str) -> str:
        """`text` without an eos of the policy's at its end, or many where it pads with them.

        Taken off one by one: a pattern would look for an end behind each of many within a long text.
        """
        end = len(text)
        while mark := next((mark for mark in self._last if text.endswith(mark, 0, end)), None):
            end -= len(mark)
        return text[:end]


def _any_of(*tokens: str) -> str:
    """A pattern for one of `tokens`, the longest that fits; for nothing where there are none."""
    return f"(?:{'|'.join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True)))})"


def _two_renderings(tokenization: Tokenization) -> list[str]:
    """A question with two answers of nothing in common, as the template writes them."""
    turns = [{"role": "user", "content": "Why?"}], tuple([{"role": "assistant", "content": said}] for said in "xy")
    try:
        return tokenization.texts(Candidates(*turns))
    except RowFault as fault:
        raise UserError(f"{fault.what}: it must render a user's question and the assistant's answer.") from fault
