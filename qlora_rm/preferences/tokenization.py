"""Tokenization of a prompt and its responses to the ids TRL's `RewardTrainer` would train on, and the over-long rule.

Plain text is prompt + response, plus the eos token's text unless the response ends with it, tokenized with special
tokens. Turns go through the chat template, which writes its own special tokens and end of turn.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

from qlora_rm.errors import UserError
from qlora_rm.preferences.bounded_templates import bound_templates
from qlora_rm.preferences.comparison import Candidates, Content, Pair, Tokens
from qlora_rm.preferences.portions import portions
from qlora_rm.preferences.prefixes import shared_length
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.values import encodable, kind_of, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverLong = Literal["truncate_prompt", "drop", "error"]

CHARACTERS_PER_TOKEN = 64
"""Servers accept at least this many characters per token of the model's length, more than any text needs."""

LARGEST_ID = 2**31
"""Upper bound of token ids, which are stored as int32."""

LONGEST_TEXT = 2_000_000
"""Bytes of a prompt with one response, for which tokenizers take about 200 bytes of memory each. A large `--max_length`
raises this limit."""
BYTES_PER_TOKEN, TEXTS_PER_ROW = 16, 8
"""Bytes accepted per token of `--max_length`; limit for all responses together, in multiples of the limit for one."""
ENCODED_AT_ONCE = 1_000_000
"""Characters per call of the tokenizer."""

NO_TEMPLATE = "is a conversation, and the tokenizer has no chat template"
TEMPLATE_HINT = "Train with --chat_template_path, a Jinja file or a model that has one, or give the rows as text."

EOS_RULE = "plain text: eos is appended unless the response ends with it; turns: as the chat template writes them"
"""How a sequence ends, in words, for people who prepare the model's input."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token sequences, and the number of tokens cut from the beginning of the prompt."""

    tokens: Tokens
    cut: int = 0


class Tokenization:
    """A run's conversion of content to token ids.

    Arguments:
        tokenizer: its pad token must not be its eos token.
        max_length: longest sequence, in tokens; None for no limit.
        over_long: "truncate_prompt" cuts the oldest part of the prompt, by the same number of tokens for all its
            responses; under "drop" and "error" an over-long row is a fault of kind `over_long`.
        vocabulary: number of token ids with embeddings in the model, against which rows of token ids are checked.
            Unset: the tokenizer's number of ids.
        positions: number of positions of the model; a longer sequence is a fault of kind `beyond_positions`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int | None = None,
        over_long: OverLong = "truncate_prompt",
        vocabulary: int | None = None,
        positions: int | None = None,
    ) -> None:
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise UserError(
                f"The tokenizer pads with its end-of-text token {tokenizer.eos_token!r}, which would move the scored "
                "token. Give it a pad token of its own."
            )
        if max_length is not None and max_length < 1:
            raise UserError(f"--max_length {max_length} must be at least 1.")
        bound_templates()
        self.tokenizer, self.max_length, self.over_long = tokenizer, max_length, over_long
        self.vocabulary, self.positions = len(tokenizer) if vocabulary is None else vocabulary, positions
        self._begins = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}

    def tokenize(self, batch: Sequence[Candidates]) -> list[Tokens]:
        """Return token ids for each prompt with its responses.

        Raises:
            RowFault: the first that `tokenize_each` finds.
        """
        tokens = []
        for result in self.tokenize_each(batch):
            if isinstance(result, RowFault):
                raise result
            tokens.append(result.tokens)
        return tokens

    def tokenize_each(self, batch: Sequence[Candidates]) -> list[Tokenized | RowFault]:
        """Return token ids, or a fault, for each prompt with its responses.

        Faults are those of `texts`, turns_without_template, text_too_long, empty_sequence, unknown_token,
        pad_in_content, response_too_long, over_long and beyond_positions. All text of the batch goes through the
        tokenizer in one call (two if it mixes turns and plain text), so larger batches are faster.
        """
        results: dict[int, Tokenized | RowFault] = {}
        texts: dict[str, dict[int, list[str]]] = {"text": {}, "turns": {}}
        for row, candidates in enumerate(batch):
            kind = kind_of(candidates.responses[0])
            try:
                self._check_size(candidates)
                if kind == "ids":
                    results[row] = self._finished(self._known_ids(candidates))
                elif kind == "turns" and self.tokenizer.chat_template is None:
                    raise RowFault("turns_without_template", f"the row {NO_TEMPLATE}", TEMPLATE_HINT)
                else:
                    texts[kind or "text"][row] = self.texts(candidates)
            except RowFault as fault:
                results[row] = fault
        for kind, of_rows in texts.items():
            ids = iter(self.encode(list(chain.from_iterable(of_rows.values())), add_special_tokens=kind == "text"))
            results |= {row: self._finished(list(islice(ids, len(of_row)))) for row, of_row in of_rows.items()}
        return [results[row] for row in range(len(batch))]

    def texts(self, candidates: Candidates) -> list[str]:
        """Return the text to tokenize for each response to a prompt of text or turns.

        Plain text gets its eos and is tokenized with special tokens; a template's rendering already contains them.

        Raises:
            RowFault: bad_template_kwargs, template_error or bad_unicode.
            UserError: there are turns and the tokenizer has no chat template.
        """
        turns = kind_of(candidates.responses[0]) == "turns"
        texts = self._rendered(candidates) if turns else self._plain(candidates)
        return [encodable(text, "the text of the row") for text in texts]

    def _plain(self, candidates: Candidates) -> list[str]:
        """Append eos unless the response ends with it, whatever the prompt is, as TRL does."""
        eos = self.tokenizer.eos_token or ""
        return [f"{candidates.prompt}{text}{'' if str(text).endswith(eos) else eos}" for text in candidates.responses]

    def _rendered(self, candidates: Candidates) -> list[str]:
        if self.tokenizer.chat_template is None:
            raise UserError(f"The row {NO_TEMPLATE}. {TEMPLATE_HINT}")
        if taken := self._of_the_library & candidates.template_kwargs.keys():
            what = (
                f"chat_template_kwargs holds {min(taken)}, which is an argument of transformers and not of the template"
            )
            raise RowFault("bad_template_kwargs", what)
        try:
            return [
                self.tokenizer.apply_chat_template(  # type: ignore[misc]
                    [*candidates.prompt, *turns], tools=candidates.tools, tokenize=False, **candidates.template_kwargs
                )
                for turns in candidates.responses
            ]
        except Exception as error:  # a template is a program: it may raise any error on turns it was not written for
            raise RowFault(
                "template_error", f"the chat template refuses the turns ({type(error).__name__}: {error!s:.200})"
            ) from error

    @cached_property
    def _of_the_library(self) -> frozenset[str]:
        """Arguments of transformers, which rows must not set: another template is a program, `truncation` is silent."""
        return frozenset(inspect.signature(self.tokenizer.apply_chat_template).parameters)

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each text; special tokens spelled out in the text become their ids."""
        ids: list[list[int]] = []
        for portion in portions(texts, len, len(texts), ENCODED_AT_ONCE):
            ids += self.tokenizer(
                portion,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        return ids

    def _check_size(self, candidates: Candidates) -> None:
        """Raise a `RowFault` of kind `text_too_long` if tokenizing would take gigabytes."""
        longest, total = candidates.size
        most = max(LONGEST_TEXT, BYTES_PER_TOKEN * (self.max_length or 0))
        if longest > most:
            what = f"a prompt and its response have {longest:,} bytes; at most {most:,} are tokenized"
        elif total > TEXTS_PER_ROW * most:
            what = f"the responses, each with the prompt, have {total:,} bytes; at most {TEXTS_PER_ROW * most:,} are tokenized"
        else:
            return
        raise RowFault("text_too_long", what)

    def _finished(self, sequences: list[list[int]]) -> Tokenized | RowFault:
        if any(not ids for ids in sequences):
            return RowFault("empty_sequence", "a sequence has no tokens")
        pad = self.tokenizer.pad_token_id
        if pad is not None and any(pad in ids for ids in sequences):
            return RowFault(
                "pad_in_content",
                f"the pad token {self.tokenizer.pad_token!r} stands in the content, which would move the scored token",
            )
        shared, longest = shared_length(sequences), max(map(len, sequences))
        tokens = Tokens(sequences[0][:shared], [ids[shared:] for ids in sequences])
        over = 0 if self.max_length is None else longest - self.max_length
        result = self._shortened(tokens, over) if over > 0 else Tokenized(tokens)
        kept = longest - result.cut if isinstance(result, Tokenized) else 0
        if self.positions is not None and kept > self.positions:
            what = f"a sequence of {kept} tokens; the model has positions for {self.positions}"
            return RowFault("beyond_positions", what)
        return result

    def _known_ids(self, candidates: Candidates) -> list[list[int]]:
        """Return the prompt's ids followed by each response's.

        Raises:
            RowFault: unknown_token. On a GPU such an id would end the process, not the row.
        """
        for name, ids in (("the prompt", candidates.prompt), *_named(candidates.responses)):
            for place, token in enumerate(ids):
                if type(token) is not int or not 0 <= token < self.vocabulary:
                    known = f"the model has token ids 0 to {self.vocabulary - 1}"
                    raise RowFault("unknown_token", f"place {place} of {name} holds token id {short(token)}; {known}")
        return [[*candidates.prompt, *ids] for ids in candidates.responses]

    def _shortened(self, tokens: Tokens, over: int) -> Tokenized | RowFault:
        """Cut `over` tokens from the beginning of the prompt, after its bos or cls token."""
        prompt = tokens.prompt_ids
        length = f"{(self.max_length or 0) + over} tokens, {over} more than --max_length {self.max_length}"
        if self.over_long != "truncate_prompt":
            way_out = "Raise --max_length, or choose --over_long truncate_prompt or drop."
            return RowFault("over_long", f"the longest sequence has {length}", way_out)
        kept = 1 if prompt and prompt[0] in self._begins else 0
        if len(prompt) - kept < over:
            way_out = "Raise --max_length, or pass --on_bad_row skip to leave such rows out and count them."
            what = f"the longest sequence has {length}, and the prompt that may be cut only {len(prompt) - kept}"
            return RowFault("response_too_long", what, way_out)
        return Tokenized(Tokens(prompt[:kept] + prompt[kept + over :], tokens.response_ids), cut=over)


def _named(responses: Sequence[Content]) -> Iterator[tuple[str, Content]]:
    return ((f"response {number}", response) for number, response in enumerate(responses, start=1))


def check_wins(tokens: Tokens, wins: Iterable[Pair]) -> None:
    """Check that no response beats one with the same tokens: such a win has no gradient.

    Raises:
        RowFault: equal_after_tokenization.
    """
    for winner, loser in wins:
        if tokens.response_ids[winner] == tokens.response_ids[loser]:
            raise RowFault(
                "equal_after_tokenization", f"responses {winner} and {loser} are the same tokens, yet one is preferred"
            )
