"""From text as a policy decodes it, its special tokens spelled out, back to the token ids of training.

Readers that hold no turns (OpenRLHF, verl) send a conversation as one text. Its ends differ from what training saw: a
tokenizer of theirs adds or strips bos, a policy stops at its eos where the template goes on with a line break, an answer
cut at the length limit has no end at all. What training always wrote is therefore put back, and nothing twice.
"""

import os
import re

from qlora_rm.errors import UserError
from qlora_rm.preferences.comparison import Candidates
from qlora_rm.preferences.faults import RowFault
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
        self._bos, self._eos, self._pad = (t or "" for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token))  # fmt: skip
        if as_turns:
            renderings = _two_renderings(tokenization)
            self._begin = self._bos if renderings[0].startswith(self._bos) else ""
            self._end = os.path.commonprefix([text[::-1] for text in renderings])[::-1]
            strips_bos = self._bos != self._eos or bool(self._begin)
        else:
            self._begin, self._end = "", self._eos
            strips_bos = tokenizer.bos_token_id in tokenization.encode(["a"], add_special_tokens=True)[0]
        # a token that neither template nor tokenizer puts first may be meant where it also ends texts (GPT-2's only one)
        self._strips_bos = bool(self._bos) and strips_bos
        whole = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)
        self._pieces = [piece for piece in re.split(f"({'|'.join(map(re.escape, whole))})", self._end) if piece]

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
        text = self._without(text, self._pad, "left")
        if self._strips_bos:
            text = self._without(text, self._bos, "left")
        return self._begin + self._ended(self._without(text, self._pad, "right"))

    def _ended(self, text: str) -> str:
        """With as much of the end as is missing; an eos that training does not write there is the policy's."""
        if self._end and text.endswith(self._end):
            return text
        for count in range(len(self._pieces) - 1, 0, -1):
            if text.endswith("".join(self._pieces[:count])):
                return text + "".join(self._pieces[count:])
        return self._without(text, self._eos, "right") + self._end

    @staticmethod
    def _without(text: str, token: str, side: str) -> str:
        """Without the repetitions of `token` at one side."""
        while token and (text.startswith(token) if side == "left" else text.endswith(token)):
            text = text.removeprefix(token) if side == "left" else text.removesuffix(token)
        return text


def _two_renderings(tokenization: Tokenization) -> list[str]:
    """A question with two answers of nothing in common, as the template writes them."""
    turns = [{"role": "user", "content": "Why?"}], tuple([{"role": "assistant", "content": said}] for said in "xy")
    try:
        return tokenization.texts(Candidates(*turns))
    except RowFault as fault:
        raise UserError(f"{fault.what}: it must render a user's question and the assistant's answer.") from fault
