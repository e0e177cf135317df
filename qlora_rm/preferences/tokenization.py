"""From a prompt and its responses to the token ids TRL's `RewardTrainer` would train on, and the over-long rule.

Plain text is prompt + response, the eos token's text appended unless the response ends with it, tokenized with special
tokens. Turns go through the chat template, which writes its own special tokens and end of turn.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

from qlora_rm.errors import UserError
from qlora_rm.preferences.bounded_templates import bound_templates
from qlora_rm.preferences.comparison import Candidates, Content, Pair, Tokens
from qlora_rm.preferences.contents import kind_of
from qlora_rm.preferences.faults import RowFault
from qlora_rm.preferences.prefixes import shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverLong = Literal["truncate_prompt", "drop", "error"]

LARGEST_ID = 2**31
"""Token ids are kept as int32."""

EOS_RULE = "plain text: eos is appended unless the response ends with it; turns: as the chat template writes them"
"""How a sequence ends, in words, for whoever feeds the model."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token sequences, and how many tokens of the prompt were cut off at its beginning."""

    tokens: Tokens
    cut: int = 0


class Tokenization:
    """How a run turns content into token ids.

    Arguments:
        tokenizer: with a pad token that is not its eos.
        max_length: longest sequence, in tokens; None for no limit.
        over_long: "truncate_prompt" cuts the oldest part of the prompt, by the same number of tokens for all its
            responses; under "drop" and "error" an over-long row is a fault of kind `over_long`.
        vocabulary: how many token ids the model has embeddings for; rows of token ids are held against it.
        positions: how many positions the model has; a longer sequence is a fault of kind `beyond_positions`.
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
        self.vocabulary, self.positions = vocabulary, positions
        self._begins = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}

    def tokenize(self, batch: Sequence[Candidates]) -> list[Tokens]:
        """Token ids for each prompt with its responses.

        Raises:
            RowFault: the first that `tokenize_each` finds.
            UserError: as there.
        """
        tokens = []
        for result in self.tokenize_each(batch):
            if isinstance(result, RowFault):
                raise result
            tokens.append(result.tokens)
        return tokens

    def tokenize_each(self, batch: Sequence[Candidates]) -> list[Tokenized | RowFault]:
        """Token ids for each prompt with its responses, or the fault that keeps it from having any: template_error,
        empty_sequence, unknown_token, pad_in_content, response_too_long, over_long or beyond_positions.

        All text of the batch goes through the tokenizer in one call (two, where it mixes turns and plain text), so
        larger batches are faster.

        Raises:
            UserError: there are turns and the tokenizer has no chat template.
        """
        results: dict[int, Tokenized | RowFault] = {}
        texts: dict[str, dict[int, list[str]]] = {"text": {}, "turns": {}}
        for row, candidates in enumerate(batch):
            kind = kind_of(candidates.responses[0])
            try:
                if kind == "ids":
                    results[row] = self._finished(self._known_ids(candidates))
                else:
                    texts[kind or "text"][row] = self.texts(candidates)
            except RowFault as fault:
                results[row] = fault
        for kind, of_rows in texts.items():
            ids = iter(self.encode(list(chain.from_iterable(of_rows.values())), add_special_tokens=kind == "text"))
            results |= {row: self._finished(list(islice(ids, len(of_row)))) for row, of_row in of_rows.items()}
        return [results[row] for row in range(len(batch))]

    def texts(self, candidates: Candidates) -> list[str]:
        """What is tokenized for each response to a prompt of text or turns: plain text with its eos, which is
        tokenized with special tokens, or the template's rendering, which holds them already.

        Raises:
            RowFault: template_error.
            UserError: there are turns and the tokenizer has no chat template.
        """
        turns = kind_of(candidates.responses[0]) == "turns"
        return self._rendered(candidates) if turns else self._plain(candidates)

    def _plain(self, candidates: Candidates) -> list[str]:
        """As TRL: the response decides about eos, whatever stands before it."""
        eos = self.tokenizer.eos_token or ""
        return [f"{candidates.prompt}{text}{'' if str(text).endswith(eos) else eos}" for text in candidates.responses]

    def _rendered(self, candidates: Candidates) -> list[str]:
        if self.tokenizer.chat_template is None:
            raise UserError(
                "The rows are conversations and the tokenizer has no chat template. Pass --chat_template_path with a "
                "Jinja file or a model that has one, or give the rows as text."
            )
        try:
            return [
                self.tokenizer.apply_chat_template(  # type: ignore[misc]
                    [*candidates.prompt, *turns], tools=candidates.tools, tokenize=False, **candidates.template_kwargs
                )
                for turns in candidates.responses
            ]
        except Exception as error:  # a template is a program: it may raise anything on turns it was not written for
            raise RowFault(
                "template_error", f"the chat template refuses the turns ({type(error).__name__}: {error})"
            ) from error

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; special tokens spelled in it become themselves."""
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

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
        """Each response's ids behind the prompt's.

        Raises:
            RowFault: unknown_token. On a GPU such an id ends the process, not the row.
        """
        for name, ids in (("the prompt", candidates.prompt), *_named(candidates.responses)):
            for place, token in enumerate(ids):
                if type(token) is not int or not 0 <= token < (self.vocabulary or LARGEST_ID):
                    known = f"; the model has token ids 0 to {self.vocabulary - 1}" if self.vocabulary else ""
                    raise RowFault("unknown_token", f"place {place} of {name} holds token id {token}{known}")
        return [[*candidates.prompt, *ids] for ids in candidates.responses]

    def _shortened(self, tokens: Tokens, over: int) -> Tokenized | RowFault:
        """`over` tokens fewer, taken from the beginning of the prompt behind its bos or cls token."""
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
    """No response may beat one that reads the same to the model: such a win has no gradient.

    Raises:
        RowFault: equal_after_tokenization.
    """
    for winner, loser in wins:
        if tokens.response_ids[winner] == tokens.response_ids[loser]:
            raise RowFault(
                "equal_after_tokenization", f"responses {winner} and {loser} are the same tokens, yet one is preferred"
            )
